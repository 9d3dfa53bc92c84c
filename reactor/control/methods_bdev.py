"""SPDK's bdev methods: what disks there are, and making and deleting them at run time."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from reactor.config.keys import disk_name
from reactor.control.bdev import Bdevs
from reactor.control.call import Method, Reply
from reactor.control.jsonrpc import INVALID_PARAMS, RpcError
from reactor.control.params import I32, U32, U64, Parameter, boolean, string, unique_id
from reactor.control.service import Service
from reactor.control.spdk import DECODE_FAILED, done, failure
from reactor.spec import DiskSpec
from reactor.units import SIZE_MAX

POLL_SECONDS: Final = 0.1  # between looks for a disk that is waited for
BLOCK_SIZE_MAX: Final = 65536  # bytes
METADATA_SIZES: Final = (0, 8, 16, 32, 64, 128)  # bytes a block

_NAME: Final = Parameter("name", string)
_UUID: Final = Parameter("uuid", unique_id, required=False)


def _optional(decode: Callable[[Any], Any], *names: str) -> tuple[Parameter, ...]:
    return tuple(Parameter(name, decode, required=False) for name in names)


_GEOMETRY: Final = (Parameter("num_blocks", U64), Parameter("block_size", U32))
_METADATA: Final = (
    *_optional(U32, "md_size", "dif_pi_format"),
    *_optional(I32, "dif_type"),
    *_optional(boolean, "dif_is_head_of_md"),
)
_MALLOC: Final = (
    *_GEOMETRY,
    *_optional(string, "name"),
    _UUID,
    *_METADATA,
    *_optional(boolean, "md_interleave"),
    *_optional(U32, "physical_block_size", "optimal_io_boundary"),
    *_optional(I32, "numa_id"),
)
_NULL: Final = (
    _NAME,
    *_GEOMETRY,
    _UUID,
    *_METADATA,
    *_optional(U32, "physical_block_size", "optimal_write_size"),
    *_optional(U32, "preferred_write_granularity", "preferred_write_alignment"),
    *_optional(U32, "preferred_unmap_granularity", "preferred_unmap_alignment"),
)
_AIO: Final = (
    _NAME,
    Parameter("filename", string),
    *_optional(U32, "block_size"),
    *_optional(boolean, "readonly", "fallocate", "nowait"),
    _UUID,
)
_GET: Final = (*_optional(string, "name"), *_optional(U64, "timeout"))
_RESIZE: Final = (_NAME, Parameter("new_size", U64))


class BdevMethods:
    """Disks, as SPDK makes, shows and deletes them."""

    def __init__(self, service: Service, bdevs: Bdevs) -> None:
        self._service = service
        self._bdevs = bdevs
        self._mallocs = 0  # numbers given to memory disks without a name; none is used twice

    def table(self) -> dict[str, Method]:
        """Return the methods by name."""

        def create(
            function: Callable[[dict[str, Any], Reply], None], parameters: tuple[Parameter, ...]
        ) -> Method:
            return Method(function, parameters, DECODE_FAILED, barrier=True)

        no_parameters = "bdev_wait_for_examine requires no parameters"
        return {
            "bdev_get_bdevs": Method(self._get, _GET, DECODE_FAILED, deadline=None),
            "bdev_wait_for_examine": Method(
                self._wait_for_examine, failure=(INVALID_PARAMS, no_parameters)
            ),
            "bdev_malloc_create": create(self._create_malloc, _MALLOC),
            "bdev_malloc_delete": Method(self._delete("malloc"), (_NAME,), DECODE_FAILED),
            "bdev_null_create": create(self._create_null, _NULL),
            "bdev_null_delete": Method(self._delete("null"), (_NAME,), DECODE_FAILED),
            "bdev_null_resize": create(self._resize_null, _RESIZE),
            "bdev_aio_create": create(self._create_aio, _AIO),
            "bdev_aio_delete": Method(self._delete("file"), (_NAME,), DECODE_FAILED),
        }

    def _get(self, params: dict[str, Any], reply: Reply) -> None:
        """Describe all bdevs or one, waiting up to `timeout` ms for it to appear."""
        name = params.get("name")
        if name is None:
            reply.result([self._bdevs.describe(disk) for disk in self._bdevs.all()])
            return
        timeout = params.get("timeout", 0)
        deadline = time.monotonic() + timeout / 1000

        def look() -> None:
            disk = self._bdevs.find(name)
            if not reply.waiting:
                return
            if disk is not None:
                reply.result([self._bdevs.describe(disk)])
            elif time.monotonic() < deadline:
                self._service.reactor.call_later(POLL_SECONDS, look)
            else:
                reply.fail(failure(errno.ETIMEDOUT if timeout else errno.ENODEV))

        look()

    def _wait_for_examine(self, _params: dict[str, Any], reply: Reply) -> None:
        """Nothing examines disks here, so nothing is waited for."""
        reply.result(True)

    def _create_malloc(self, params: dict[str, Any], reply: Reply) -> None:
        """Make a memory disk; the result is its name."""
        size = _size(params, errno.ENOMEM)
        numa = params.get("numa_id", -1)
        if numa != -1 and not Path(f"/sys/devices/system/node/node{numa}").exists():
            raise failure(errno.EINVAL)
        name = params.get("name")
        if name is None:
            name = self._next_malloc()
        options = {"size": size}
        block_size, uuid = params["block_size"], params.get("uuid")
        spec = DiskSpec(name, "malloc", options, block_size=block_size, uuid=uuid)
        self._create(spec, reply)

    def _next_malloc(self) -> str:
        while True:
            name = f"Malloc{self._mallocs}"
            self._mallocs += 1
            if not self._bdevs.is_taken(name):
                return name

    def _create_null(self, params: dict[str, Any], reply: Reply) -> None:
        """Make a disk that forgets what is written; the result is its name."""
        options = {"size": _size(params, errno.EINVAL)}
        block_size, uuid = params["block_size"], params.get("uuid")
        spec = DiskSpec(params["name"], "null", options, block_size=block_size, uuid=uuid)
        self._create(spec, reply)

    def _create_aio(self, params: dict[str, Any], reply: Reply) -> None:
        """Make a disk of a file or block device; the result is its name."""
        block_size = params.get("block_size") or None  # SPDK takes 0 for "ask the device"
        if block_size is not None:
            _check_block_size(block_size)
        # The worker may have another working directory.
        path = os.path.abspath(params["filename"])  # noqa: PTH100 - a link must stay a link
        if any(os.path.realpath(path) == disk.device for disk in self._service.disks()):
            raise failure(errno.EBUSY)  # a worker that waits for its own device waits for ever
        spec = DiskSpec(
            params["name"],
            "file",
            {"path": path},
            block_size=block_size,
            readonly=params.get("readonly", False),
            uuid=params.get("uuid"),
        )
        self._create(spec, reply)

    def _create(self, spec: DiskSpec, reply: Reply) -> None:
        try:
            disk_name(spec.name)
        except ValueError as error:
            raise RpcError(-errno.EINVAL, str(error)) from error
        if any(self._bdevs.is_taken(name) for name in (spec.name, spec.uuid) if name is not None):
            raise failure(errno.EEXIST)
        self._service.create(spec, done(reply, spec.name))

    def _delete(self, backend: str) -> Callable[[dict[str, Any], Reply], None]:
        def delete(params: dict[str, Any], reply: Reply) -> None:
            """Hot-remove a bdev from whatever uses it; answered when it is released."""
            disk = self._service.disk(params["name"])
            if disk is None or disk.spec.backend != backend:
                raise failure(errno.ENODEV)
            self._service.remove(disk.spec.name, done(reply, True))

        return delete

    def _resize_null(self, params: dict[str, Any], reply: Reply) -> None:
        """Grow a null bdev to `new_size` MiB."""
        disk = self._service.disk(params["name"])
        if disk is None:
            raise failure(errno.ENODEV)
        size = params["new_size"] << 20
        if disk.spec.backend != "null" or size > SIZE_MAX or size < disk.size:
            raise failure(errno.EINVAL)
        self._service.resize(disk.spec.name, size, done(reply, True))


def _size(params: dict[str, Any], too_large: int) -> int:
    """Return the size in bytes; raises RpcError when the geometry cannot be served."""
    _check_block_size(params["block_size"])
    if params["num_blocks"] == 0 or params.get("md_size", 0) not in METADATA_SIZES:
        raise failure(errno.EINVAL)
    if params.get("md_size", 0) or params.get("dif_type", 0):
        raise failure(errno.EOPNOTSUPP)  # accepting it would promise protection
    size = int(params["num_blocks"] * params["block_size"])
    if size > SIZE_MAX:
        raise failure(too_large)
    return size


def _check_block_size(block_size: int) -> None:
    if not 512 <= block_size <= BLOCK_SIZE_MAX or block_size & (block_size - 1):
        raise failure(errno.EINVAL)

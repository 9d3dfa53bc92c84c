"""Disks as SPDK's clients see them: bdevs, with UUIDs, aliases and supported I/O types."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Final

from backends import registry
from reactor.control.service import DiskStatus, Service
from reactor.errors import ReactorError
from reactor.protocol.wire import (
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from reactor.spec import DiskSpec

#: SPDK's enumeration, in its order; what a disk can do of it is set in `_io_types`.
_IO_TYPES: Final = (
    *("read", "write", "unmap", "flush", "reset", "nvme_admin", "nvme_io", "nvme_io_md"),
    *("write_zeroes", "zcopy", "get_zone_info", "zone_management", "zone_append", "compare"),
    *("compare_and_write", "abort", "seek_hole", "seek_data", "copy", "nvme_iov_md"),
    *("nvme_nssr", "write_uncorrectable"),
)
_PREFERENCES: Final = (
    "preferred_write_alignment",
    "preferred_write_granularity",
    "optimal_write_size",
    "preferred_unmap_alignment",
    "preferred_unmap_granularity",
)
_RATE_LIMITS: Final = (
    "rw_ios_per_sec",
    "rw_mbytes_per_sec",
    "r_mbytes_per_sec",
    "w_mbytes_per_sec",
)


class Bdevs:
    """The service's disks under their names and UUIDs."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def all(self) -> Iterator[DiskStatus]:
        """Return the disks that can be used, in the order of their creation."""
        return (disk for disk in self._service.disks() if _is_registered(disk))

    def find(self, name: str) -> DiskStatus | None:
        """Return the usable disk with this name or UUID."""
        return next((disk for disk in self.all() if name in _names(disk.spec)), None)

    def is_taken(self, name: str) -> bool:
        """Whether a disk, in whatever state, has this name or UUID."""
        return any(name in _names(disk.spec) for disk in self._service.disks())

    def describe(self, disk: DiskStatus) -> dict[str, Any]:
        """Return SPDK's bdev object."""
        spec = disk.spec
        uid = _uuid(spec)
        return {
            "name": spec.name,
            "aliases": [uid] if uid != spec.name else [],
            "product_name": _product_name(spec.backend),
            "block_size": disk.block_size,
            "num_blocks": disk.size // disk.block_size,
            **dict.fromkeys(_PREFERENCES, 0),
            "uuid": uid,
            "assigned_rate_limits": dict.fromkeys(_RATE_LIMITS, 0),
            "claimed": False,
            "zoned": False,
            "supported_io_types": _io_types(disk.flags),
            "driver_specific": _driver_specific(disk),
        }


def _uuid(spec: DiskSpec) -> str:
    """Return the disk's UUID: the given one, else always the same for the same name."""
    return spec.uuid or str(uuid.uuid5(uuid.NAMESPACE_OID, f"nbd-reactor:{spec.name}"))


def _names(spec: DiskSpec) -> tuple[str, str]:
    return spec.name, _uuid(spec)


def _is_registered(disk: DiskStatus) -> bool:
    # A disk that is starting again keeps its size: for clients it never went away.
    return disk.state in ("online", "starting") and disk.block_size > 0


def _product_name(backend: str) -> str:
    try:
        return registry.backend(backend).product_name
    except ReactorError:
        return backend


def _io_types(flags: int) -> dict[str, bool]:
    able = {
        "read": True,
        "write": not flags & NBD_FLAG_READ_ONLY,
        "unmap": bool(flags & NBD_FLAG_SEND_TRIM),
        "flush": bool(flags & NBD_FLAG_SEND_FLUSH),
        "write_zeroes": bool(flags & NBD_FLAG_SEND_WRITE_ZEROES),
    }
    return {name: able.get(name, False) for name in _IO_TYPES}


def _driver_specific(disk: DiskStatus) -> dict[str, Any]:
    if disk.spec.backend != "file":
        return {}
    return {
        "aio": {
            "filename": disk.spec.options["path"],
            "block_size_override": disk.spec.block_size is not None,
            "readonly": disk.spec.readonly,
            "fallocate": bool(disk.flags & NBD_FLAG_SEND_TRIM),
            "nowait": False,
        }
    }

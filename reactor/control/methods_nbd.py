"""SPDK's three nbd methods."""

from __future__ import annotations

import errno
import re
from typing import Any, Final

from reactor.control.bdev import Bdevs
from reactor.control.call import Method, Reply
from reactor.control.jsonrpc import RpcError
from reactor.control.params import Parameter, string
from reactor.control.service import Service
from reactor.control.spdk import DECODE_FAILED, done, failure, spdk_error

_DEVICE: Final = re.compile(r"/dev/nbd(0|[1-9]\d{0,8})", re.ASCII)


class NbdMethods:
    """Kernel devices on disks."""

    def __init__(self, service: Service, bdevs: Bdevs) -> None:
        self._service = service
        self._bdevs = bdevs

    def table(self) -> dict[str, Method]:
        """Return the methods by name."""
        device = Parameter("nbd_device", string)
        any_device = Parameter("nbd_device", string, required=False)
        start = (Parameter("bdev_name", string), any_device)
        return {
            "nbd_start_disk": Method(self._start, start, DECODE_FAILED),
            "nbd_stop_disk": Method(self._stop, (device,), DECODE_FAILED),
            "nbd_get_disks": Method(self._get, (any_device,), DECODE_FAILED),
        }

    def _start(self, params: dict[str, Any], reply: Reply) -> None:
        """Attach a disk to a device, or to the first free one; the result is its path."""
        device = params.get("nbd_device")
        if device is not None:
            if not _DEVICE.fullmatch(device):
                raise RpcError(-errno.ENODEV, f"illegal nbd device {device}")
            if any(device in (disk.device, disk.spec.device) for disk in self._service.disks()):
                raise failure(errno.EBUSY)
        disk = self._bdevs.find(params["bdev_name"])
        if disk is None:
            raise failure(errno.ENODEV)

        def attached(result: str | Exception) -> None:
            if isinstance(result, str):
                reply.result(result)
            elif device is None and getattr(result, "errno", None) == errno.EBUSY:
                reply.fail(RpcError(-errno.ENODEV, "nbd device not found"))
            else:
                reply.fail(spdk_error(result))

        self._service.attach(disk.spec.name, device, attached)

    def _stop(self, params: dict[str, Any], reply: Reply) -> None:
        """Detach a device; answered when it is free again."""
        self._service.detach(params["nbd_device"], done(reply, True))

    def _get(self, params: dict[str, Any], reply: Reply) -> None:
        """List the attached devices."""
        wanted = params.get("nbd_device")
        found = [
            {"nbd_device": disk.device, "bdev_name": disk.spec.name}
            for disk in self._service.disks()
            if disk.device is not None and wanted in (None, disk.device)
        ]
        if wanted is not None and not found:
            raise failure(errno.ENODEV)
        reply.result(found)

"""Attaching, by whatever way the kernel offers, and finding again what it still holds."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Sequence
from socket import socket
from typing import Final

from reactor.attach import ioctl, netlink, occupants, sysfs
from reactor.attach.apart import DEVICE_IO
from reactor.attach.block import Attachment, Device
from reactor.attach.deviceio import What
from reactor.errors import DeviceError
from reactor.spec import AttachWay

__all__ = ["DEVICE_IO", "Device", "adopt", "attach", "claims", "held"]

SOMEBODY: Final = "somebody"

_PATH: Final = re.compile(r"/dev/nbd(0|[1-9][0-9]{0,5})")


def attach(
    device: str,
    way: AttachWay,
    *,
    tag: str,
    size: int,
    block_size: int,
    flags: int,
    kernel_ends: Sequence[socket],
    timeout: int | None,
    dead_timeout: int,
) -> Device:
    """Attach `device` (`/dev/nbdN`, or `auto` for the first free one) to `kernel_ends`.

    `flags` are transmission flags; sizes in bytes, times in seconds (timeout 0: never, None: the
    way's default). Closes `kernel_ends` in every case. Raises DeviceError.
    """
    try:
        attachment = Attachment(tag, size, block_size, flags, kernel_ends, timeout, dead_timeout)
        attachment.check(device)
        _prepare()
        return _attach(_index(device), way, attachment)
    finally:
        for end in kernel_ends:
            end.close()


def adopt(tag: str, *, patient: bool = False) -> Device | None:
    """Return the netlink device that the kernel holds under exactly this tag.

    `patient`: it has one connection and no timeout; who attached it may have died before the kernel
    was told what that means. Raises OSError or DeviceError when it cannot be known.
    """
    found = [i for i in sysfs.indexes() if sysfs.pid(i) is not None and sysfs.backend(i) == tag]
    devices = [netlink.NetlinkDevice(index, tag) for index in found]
    if len(devices) > 1:  # those that are disconnected and still open stay until they are closed
        devices = [device for device in devices if device.is_configured()] or devices
    if not devices:
        return None
    _prepare()
    return netlink.NetlinkDevice(devices[0].index, tag, patient=patient)


def claims(path: str, seconds: float) -> list[str]:
    """Return what stands on a device, in words: mounts, swap, other devices.

    In whatever mount namespace, and by whatever name, as the kernel itself is asked. Raises OSError
    when that cannot be known, TimeoutError when the device does not answer for so many seconds.
    """
    index = _index(path)
    assert index is not None
    return occupants.claims(path, index) or ([SOMEBODY] if _is_claimed(index, seconds) else [])


def _is_claimed(index: int, seconds: float) -> bool:
    try:
        DEVICE_IO.await_start()
        DEVICE_IO.ask(What.LOOK, index).wait(seconds)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        if error.errno not in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
            raise
    return False


def _prepare() -> None:
    with contextlib.suppress(OSError):  # what asks it tries again
        DEVICE_IO.start()


def held(prefix: str) -> list[str]:
    """Return the tags that begin with `prefix` of all devices that the kernel holds.

    Raises OSError when that cannot be known.
    """
    tags = [sysfs.backend(index) for index in sysfs.indexes() if sysfs.pid(index) is not None]
    return [tag for tag in tags if tag is not None and tag.startswith(prefix)]


def _index(device: str) -> int | None:
    if device == "auto":
        return None
    match = _PATH.fullmatch(device)
    if match is None:
        message = f"{device} is no nbd device; expected /dev/nbd0, /dev/nbd1, … or auto"
        raise DeviceError(errno.EINVAL, message)
    return int(match[1])


def _attach(index: int | None, way: AttachWay, attachment: Attachment) -> Device:
    if not sysfs.driver_present():
        message = "the kernel has no nbd driver loaded; load it with: modprobe nbd"
        raise DeviceError(errno.ENODEV, message)
    if way != "ioctl":
        try:
            return netlink.connect(index, attachment)
        except netlink.NoFamily as error:
            if way == "netlink":
                message = "the kernel's nbd driver offers no netlink here; use attach: ioctl"
                raise DeviceError(errno.EOPNOTSUPP, message) from error
    return ioctl.attach(index, attachment)

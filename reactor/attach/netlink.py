"""Devices attached through the nbd driver's generic netlink family: they survive their worker.

Source: include/uapi/linux/nbd-netlink.h and drivers/block/nbd.c.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Sequence
from socket import MSG_DONTWAIT, MSG_PEEK, socket
from typing import Final

from reactor.attach import occupants, sysfs
from reactor.attach.apart import DEVICE_IO
from reactor.attach.block import Attachment, Device, while_busy
from reactor.attach.deviceio import What
from reactor.attach.genetlink import U32, U64, Family, attribute, nested
from reactor.errors import DeviceError, is_shortage, reason
from reactor.log import logger

NBD_CMD_CONNECT: Final = 1
NBD_CMD_DISCONNECT: Final = 2
NBD_CMD_RECONFIGURE: Final = 3

NBD_ATTR_INDEX: Final = 1
NBD_ATTR_SIZE_BYTES: Final = 2
NBD_ATTR_BLOCK_SIZE_BYTES: Final = 3
NBD_ATTR_TIMEOUT: Final = 4
NBD_ATTR_SERVER_FLAGS: Final = 5
NBD_ATTR_SOCKETS: Final = 7
NBD_ATTR_DEAD_CONN_TIMEOUT: Final = 8
NBD_ATTR_BACKEND_IDENTIFIER: Final = 10
NBD_SOCK_ITEM: Final = 1
NBD_SOCK_FD: Final = 1

# The driver sends a request again only when the block layer asks about it, and the block layer's
# 30 s would be the length of the stall after a worker's death. With one connection and timeout 0
# the question never fails a request, however slow (nbd_xmit_timeout).
IO_TIMEOUT_MS: Final = 1000
# With several connections a request that is not answered in time ends its connection, whatever the
# timeout, and is sent again on another one. So this is how long I/O in flight stalls when a worker
# dies, and it must be more than a healthy disk ever takes: the kernel may send a request again
# while the first is still under way.
SEVERAL_TIMEOUT: Final = 10  # seconds

log = logger(__name__)


class NoFamily(Exception):
    """The driver does not speak netlink, or not in this network namespace."""


def connect(index: int | None, attachment: Attachment) -> NetlinkDevice:
    """Attach to the device `index`, or to the first free one; raises NoFamily or DeviceError."""
    try:
        family = Family("nbd")
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise NoFamily from error
        raise DeviceError(error.errno or errno.EIO, f"netlink: {reason(error)}") from error
    try:
        taken = _connect(family, index, attachment)
    except BaseException:
        family.close()
        raise
    patient = not attachment.timeout and len(attachment.kernel_ends) == 1
    device = NetlinkDevice(taken, attachment.tag, family, patient=patient)
    sysfs.announce(taken)
    return device


def _connect(family: Family, index: int | None, attachment: Attachment) -> int:
    timeout = attachment.timeout or (SEVERAL_TIMEOUT if len(attachment.kernel_ends) > 1 else 0)
    message = [
        _number(NBD_ATTR_SIZE_BYTES, attachment.size),
        _number(NBD_ATTR_BLOCK_SIZE_BYTES, attachment.block_size),
        _number(NBD_ATTR_TIMEOUT, timeout),
        _number(NBD_ATTR_SERVER_FLAGS, attachment.kernel_flags),
        _number(NBD_ATTR_DEAD_CONN_TIMEOUT, attachment.dead_timeout),
        _tag(attachment.tag),
        _sockets(attachment.kernel_ends),
    ]
    if index is not None:
        message.append(_index(index))
    name = "a device" if index is None else f"/dev/nbd{index}"

    def take() -> int:
        return family.ask_number(U32, NBD_ATTR_INDEX, NBD_CMD_CONNECT, *message)

    try:
        return while_busy(index, take)
    except OSError as error:
        raise _refusal(f"{name} cannot be attached", error) from error


def _set_io_timeout(index: int) -> None:
    """Have I/O that was in flight when a worker died sent again soon; not awaited.

    Since Linux 6.11 the kernel first awaits the requests in flight, which may wait for us.
    """

    def warn(failure: int) -> None:
        if failure:
            message = "/dev/nbd%d: I/O in flight will stall for 30 s when its worker dies: %s"
            log.warning(message, index, os.strerror(failure))

    with contextlib.suppress(OSError):
        if sysfs.io_timeout(index) == IO_TIMEOUT_MS:
            return
    try:
        DEVICE_IO.ask(What.SET_IO_TIMEOUT, index, IO_TIMEOUT_MS, warn)
    except OSError as error:
        warn(error.errno or errno.EIO)


class NetlinkDevice(Device):
    """A device that the kernel holds under a tag, whoever serves it.

    `patient`: a request may take any time.
    """

    way = "netlink"
    can_reconnect = True

    def __init__(
        self, index: int, tag: str, owner: Family | None = None, *, patient: bool = False
    ) -> None:
        super().__init__(index)
        self._tag = tag
        self._patient = patient
        # Kept open: kernels may come to release a device when the socket that connected it closes.
        self._owner = owner
        self._set_io_timeout()

    def probe(self) -> None:
        super().probe()
        self._set_io_timeout()

    def reconnect(self, kernel_ends: Sequence[socket], worker_ends: Sequence[socket]) -> None:
        try:
            self._reconfigure("cannot be given a new socket", _sockets(kernel_ends))
        except DeviceError as error:
            if error.errno == errno.EINVAL and (users := occupants.users(self.path, self.index)):
                raise occupants.still_used(self.path, users) from error
            raise
        finally:
            for end in kernel_ends:
                end.close()
        # RECONFIGURE succeeds also when it found no dead socket to replace and dropped ours.
        if not all(_is_connected(end) for end in worker_ends):
            message = f"{self.path} has not noticed yet that its connection is dead"
            raise DeviceError(errno.EAGAIN, message)
        self._set_io_timeout()

    def _set_io_timeout(self) -> None:
        """Do so, unless it is done: in a shortage it fails."""
        if self._patient:
            _set_io_timeout(self.index)

    def resize(self, size: int, block_size: int) -> None:
        if sysfs.size(self.index) == size and sysfs.block_size(self.index) == block_size:
            return  # to say it again may wait for the requests in flight (Linux 6.14)
        try:
            self._reconfigure(
                "cannot change its size",
                _number(NBD_ATTR_SIZE_BYTES, size),
                _number(NBD_ATTR_BLOCK_SIZE_BYTES, block_size),
            )
        except DeviceError as error:
            users = occupants.users(self.path, self.index) if error.errno == errno.EINVAL else []
            if users and not self.is_configured():
                raise occupants.still_used(self.path, users) from error
            raise

    def detach(self) -> None:
        holder = sysfs.pid(self.index)
        self._holder = self._holder or holder
        if holder is not None and holder == self._holder:  # else an earlier try has freed it
            self._check_ours()
            self._ask("cannot be detached", NBD_CMD_DISCONNECT)
            try:
                self._await_release()
            finally:
                sysfs.announce(self.index)
        if self._owner is not None:
            self._owner.close()

    def is_configured(self) -> bool:
        """Whether the kernel would change anything of it: not when it was disconnected."""
        try:
            self._reconfigure("is disconnected")
        except DeviceError as error:
            if is_shortage(error):
                raise
            return False
        return True

    def _reconfigure(self, failed: str, *attributes: bytes) -> None:
        self._check_ours()
        # The kernel itself compares the tag here: nobody else's device can be meant.
        self._ask(failed, NBD_CMD_RECONFIGURE, _tag(self._tag), *attributes)

    def _ask(self, failed: str, command: int, *attributes: bytes) -> None:
        # A socket of its own: an abandoned call may still wait on another one.
        try:
            with Family("nbd") as family:
                family.ask(command, _index(self.index), *attributes)
        except OSError as error:
            raise _refusal(f"{self.path} {failed}", error) from error

    def _check_ours(self) -> None:
        if sysfs.pid(self.index) is None:
            raise DeviceError(errno.ENODEV, f"{self.path} is not attached any more")
        tag = sysfs.backend(self.index)
        if tag != self._tag:
            message = f"{self.path} belongs to {tag or 'another program'} now and is left alone"
            raise DeviceError(errno.EBUSY, message)


def _is_connected(worker_end: socket) -> bool:
    try:
        return worker_end.recv(1, MSG_PEEK | MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _refusal(what: str, error: OSError) -> DeviceError:
    number = error.errno or errno.EIO
    if number == errno.EPERM:
        return DeviceError(number, f"{what}: this needs root (CAP_SYS_ADMIN)")
    if number == errno.EINVAL:  # the driver explains itself only there
        return DeviceError(number, f"{what}: the kernel refuses it; dmesg may say why")
    return DeviceError(number, f"{what}: {reason(error)}")


def _number(kind: int, value: int) -> bytes:
    return attribute(kind, U64.pack(value))


def _index(index: int) -> bytes:
    return attribute(NBD_ATTR_INDEX, U32.pack(index))


def _tag(tag: str) -> bytes:
    return attribute(NBD_ATTR_BACKEND_IDENTIFIER, tag.encode() + b"\0")


def _sockets(ends: Sequence[socket]) -> bytes:
    items = (attribute(NBD_SOCK_FD, U32.pack(end.fileno())) for end in ends)
    return nested(NBD_ATTR_SOCKETS, *(nested(NBD_SOCK_ITEM, item) for item in items))

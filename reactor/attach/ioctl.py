"""Devices attached by ioctl: a thread of this process holds each, and they end with it.

Source: include/uapi/linux/nbd.h and drivers/block/nbd.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import threading
import time
from collections.abc import Sequence
from functools import partial
from socket import SHUT_RDWR, socket
from typing import Final

from reactor import background
from reactor.attach import occupants, sysfs
from reactor.attach.block import BUSY_PAUSE_SECONDS, Attachment, Device, device_path, while_busy
from reactor.errors import DeviceError, reason
from reactor.log import logger

NBD_SET_SOCK: Final = 0xAB00
NBD_SET_BLKSIZE: Final = 0xAB01
NBD_SET_SIZE: Final = 0xAB02
NBD_DO_IT: Final = 0xAB03
NBD_CLEAR_SOCK: Final = 0xAB04
NBD_CLEAR_QUE: Final = 0xAB05
NBD_DISCONNECT: Final = 0xAB08
NBD_SET_TIMEOUT: Final = 0xAB09
NBD_SET_FLAGS: Final = 0xAB0A

TIMEOUT_SECONDS: Final = 60  # without one a request that nobody answers would hang for ever
READY_SECONDS: Final = 5.0
STOP_SECONDS: Final = 10.0

log = logger(__name__)
_libc = ctypes.CDLL(None, use_errno=True)


def attach(index: int | None, attachment: Attachment) -> IoctlDevice:
    """Attach to the device `index`, or to the first free one; raises DeviceError."""
    if index is not None:
        return _attach(index, attachment)
    for candidate in sysfs.indexes():
        if sysfs.is_free(candidate) and not occupants.processes_with(device_path(candidate)):
            try:
                return _attach(candidate, attachment)
            except DeviceError as error:
                if error.errno != errno.EBUSY:
                    raise
    raise DeviceError(errno.EBUSY, "every /dev/nbdN is in use; load nbd with a larger nbds_max")


def _attach(index: int, attachment: Attachment) -> IoctlDevice:
    path = device_path(index)
    try:
        fd = while_busy(index, lambda: _claim(index, attachment.kernel_ends[0]))
    except OSError as error:
        raise _refusal(path, error) from error
    try:
        for end in attachment.kernel_ends[1:]:
            _ioctl(fd, NBD_SET_SOCK, end.fileno())
        _set_size(fd, attachment.size, attachment.block_size)
        timeout = TIMEOUT_SECONDS if attachment.timeout is None else attachment.timeout
        _ioctl(fd, NBD_SET_TIMEOUT, timeout)
        _ioctl(fd, NBD_SET_FLAGS, attachment.kernel_flags)
        device = IoctlDevice(index, fd, [end.dup() for end in attachment.kernel_ends])
    except OSError as error:
        _clear(fd)
        raise _refusal(path, error) from error
    device.start()
    return device


def _claim(index: int, kernel_end: socket) -> int:
    """Open the device and give it its first socket, which makes it ours; raises OSError."""
    # Not even opened while it is another's: some devices disconnect at the first close.
    if sysfs.pid(index) is not None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    fd = os.open(device_path(index), os.O_RDWR | os.O_CLOEXEC)
    try:
        _ioctl(fd, NBD_SET_SOCK, kernel_end.fileno())
    except OSError:
        os.close(fd)
        raise
    return fd


class IoctlDevice(Device):
    """A device that lives in one thread's NBD_DO_IT; releasing it is that thread's last act."""

    way = "ioctl"
    can_reconnect = False

    def __init__(self, index: int, fd: int, kernel_ends: Sequence[socket]) -> None:
        super().__init__(index)
        self._fd = fd
        # Ours as well as the kernel's: shutting them down frees a kernel that waits for a worker.
        self._kernel_ends = kernel_ends
        self._lock = threading.Lock()  # _fd is open while it is held and _released is not set
        self._disconnected: threading.Event | None = None  # while NBD_DISCONNECT is under way
        self._error: OSError | None = None
        self._returned = threading.Event()
        self._released = threading.Event()

    def start(self) -> None:
        """Let the kernel begin; raises DeviceError when it does not, and releases the device."""
        try:
            background.start(self._hold)
        except OSError as error:
            self._let_go()
            raise _refusal(self.path, error) from error
        try:
            self._await_size()
        except (OSError, DeviceError):
            self.detach()
            raise
        if self._error is not None:
            self._released.wait(STOP_SECONDS)
            raise _refusal(self.path, self._error)

    def _await_size(self) -> None:
        deadline = time.monotonic() + READY_SECONDS
        while not sysfs.size(self.index) and not self._returned.is_set():
            if time.monotonic() > deadline:
                raise DeviceError(errno.ETIMEDOUT, f"{self.path} does not come up")
            time.sleep(BUSY_PAUSE_SECONDS)

    def reconnect(self, kernel_ends: Sequence[socket], worker_ends: Sequence[socket]) -> None:
        for end in kernel_ends:
            end.close()
        message = f"{self.path} is attached by ioctl, which allows no new socket"
        raise DeviceError(errno.EOPNOTSUPP, message)

    def resize(self, size: int, block_size: int) -> None:
        with self._lock:
            if self._returned.is_set():
                raise DeviceError(errno.ENODEV, f"{self.path} is not attached any more")
            try:
                _set_size(self._fd, size, block_size)
            except OSError as error:
                raise self.failure("cannot change its size", error) from error

    def detach(self) -> None:
        patience = STOP_SECONDS if self._disconnect() else 0
        if not self._returned.wait(patience):
            log.warning("%s: the worker does not end its connection; it is cut", self.path)
            for end in self._kernel_ends:
                with contextlib.suppress(OSError):  # closed meanwhile: the kernel has let go
                    end.shutdown(SHUT_RDWR)
        if not self._released.wait(STOP_SECONDS):
            raise DeviceError(errno.ETIMEDOUT, f"{self.path} is not released by the kernel")
        # By now another may have the device.
        self._await_release()

    def _disconnect(self) -> bool:
        """Have the kernel end its connections; returns whether it is told, or need not be."""
        with self._lock:
            if self._disconnected is None and not self._returned.is_set():
                ended = threading.Event()
                try:
                    # In a thread: it waits for room in a socket that its worker may not read.
                    background.start(partial(self._send_disconnect, ended))
                except OSError as error:
                    log.warning("%s: %s", self.path, reason(error))
                    return False
                self._disconnected = ended
        return True

    def _send_disconnect(self, ended: threading.Event) -> None:
        try:
            _ioctl(self._fd, NBD_DISCONNECT)
        except OSError as error:  # EINVAL: it is disconnected already
            log.debug("%s: NBD_DISCONNECT: %s", self.path, reason(error))
        finally:
            ended.set()

    def _hold(self) -> None:
        self._holder = threading.get_native_id()
        try:
            _ioctl(self._fd, NBD_DO_IT)
        except OSError as error:
            self._error = error
            log.debug("%s: NBD_DO_IT: %s", self.path, reason(error))
        self._returned.set()
        with self._lock:
            disconnected = self._disconnected
        if disconnected is not None:
            disconnected.wait()  # it uses the descriptor
        self._let_go()

    def _let_go(self) -> None:
        with self._lock:
            _clear(self._fd)
        for end in self._kernel_ends:
            end.close()
        self._released.set()


def _ioctl(fd: int, request: int, argument: int = 0) -> None:
    # Not fcntl.ioctl: its arguments end at 2^31, a size does not.
    if _libc.ioctl(fd, ctypes.c_ulong(request), ctypes.c_ulong(argument)) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _set_size(fd: int, size: int, block_size: int) -> None:
    _ioctl(fd, NBD_SET_BLKSIZE, block_size)
    _ioctl(fd, NBD_SET_SIZE, size)


def _clear(fd: int) -> None:
    """Fail what is in flight, take back our sockets, and close the device."""
    for request in (NBD_CLEAR_QUE, NBD_CLEAR_SOCK):
        try:
            _ioctl(fd, request)
        except OSError as error:
            log.debug("ioctl %#x: %s", request, reason(error))
    os.close(fd)


def _refusal(path: str, error: OSError) -> DeviceError:
    number = error.errno or errno.EIO
    if number in (errno.EPERM, errno.EACCES):
        return DeviceError(number, f"{path} cannot be attached: this needs root (CAP_SYS_ADMIN)")
    if number in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        message = f"{path} does not exist; load nbd with a larger nbds_max"
        return DeviceError(number, message)
    return DeviceError(number, f"{path} cannot be attached: {reason(error)}")

"""An attached device: what both ways of attaching share, and what they must do."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import socket
from typing import ClassVar, Final, Literal, TypeVar

from reactor.attach import occupants, sysfs
from reactor.attach.apart import DEVICE_IO
from reactor.attach.deviceio import What
from reactor.errors import DeviceError
from reactor.protocol.wire import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_ROTATIONAL,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)

Taken = TypeVar("Taken")

BLOCK_SIZES: Final = (512, 1024, 2048, 4096)
SIZE_MAX: Final = (1 << 63) - 1  # bytes (loff_t)
BUSY_SECONDS: Final = 1.0
BUSY_PAUSE_SECONDS: Final = 0.02
RELEASE_SECONDS: Final = 5.0
# Those that some kernel's driver looks at; what it does not know it ignores.
KERNEL_FLAGS: Final = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_READ_ONLY
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_ROTATIONAL
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_CAN_MULTI_CONN
)
MODIFYING_FLAGS: Final = NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES


@dataclass(frozen=True, slots=True)
class Attachment:
    """What the kernel is told. Sizes in bytes, times in seconds."""

    tag: str
    size: int
    block_size: int
    flags: int
    kernel_ends: Sequence[socket]
    timeout: int | None  # None: the way's default
    dead_timeout: int

    def check(self, device: str) -> None:
        """Raise DeviceError EINVAL when no kernel would take it."""
        if self.block_size not in BLOCK_SIZES:
            problem = f"a block size of {self.block_size}; a device needs 512, 1024, 2048 or 4096"
        elif self.size <= 0 or self.size % self.block_size or self.size > SIZE_MAX:
            problem = f"a size of {self.size}; it must be a multiple of {self.block_size}, not 0"
        elif len(self.kernel_ends) > 1 and not self.flags & NBD_FLAG_CAN_MULTI_CONN:
            problem = f"{len(self.kernel_ends)} connections; its backend allows 1"
        else:
            return
        raise DeviceError(errno.EINVAL, f"{device} cannot be attached to a disk with {problem}")

    @property
    def kernel_flags(self) -> int:
        """The transmission flags that a kernel understands."""
        flags = self.flags & KERNEL_FLAGS | NBD_FLAG_HAS_FLAGS
        if flags & NBD_FLAG_READ_ONLY:
            flags &= ~MODIFYING_FLAGS
        return flags


class Device(ABC):
    """A /dev/nbdN that the kernel serves through our sockets.

    Every call may block for as long as the worker does not answer. Raises DeviceError.
    """

    way: ClassVar[Literal["netlink", "ioctl"]]
    can_reconnect: ClassVar[bool]

    def __init__(self, index: int) -> None:
        self.index = index
        self.path = device_path(index)
        self._holder: int | None = None  # the thread that configured it, as in sysfs

    @abstractmethod
    def reconnect(self, kernel_ends: Sequence[socket], worker_ends: Sequence[socket]) -> None:
        """Give the kernel new sockets for the dead ones; closes `kernel_ends` in every case.

        DeviceError EAGAIN: the kernel did not take them, because it has not noticed yet that the
        old ones are dead. Retry with new pairs.
        """

    @abstractmethod
    def resize(self, size: int, block_size: int) -> None:
        """Tell the kernel the new size (bytes)."""

    @abstractmethod
    def detach(self) -> None:
        """Release the device; nothing to do when that has happened already.

        A worker that lives but does not read must be ended before (NBD_DISCONNECT would block).
        DeviceError EBUSY: it is released, but somebody still has the node open.
        """

    def probe(self) -> None:
        """Read the first block from the worker, past the page cache."""
        try:
            DEVICE_IO.ask(What.READ, self.index, sysfs.block_size(self.index)).wait()
        except OSError as error:
            raise self.failure("cannot be read", error) from error

    def flush(self) -> None:
        """Write back what the page cache holds for the device, and flush the disk."""
        try:
            DEVICE_IO.ask(What.WRITE_BACK, self.index).wait()
        except OSError as error:
            raise self.failure("cannot be flushed, recent writes may be lost", error) from error

    def failure(self, what: str, error: OSError) -> DeviceError:
        """Return the DeviceError for `error`."""
        number = error.errno or errno.EIO
        return DeviceError(number, f"{self.path} {what}: {error.strerror or error}")

    def is_held(self) -> bool:
        """Whether, after a `detach`, the kernel has it as it was, for those who have it open."""
        try:
            return self._holder is not None and sysfs.pid(self.index) == self._holder
        except OSError:  # that cannot be known now
            return True

    def _await_release(self) -> None:
        """Wait until the kernel has forgotten what was configured."""
        deadline = time.monotonic() + RELEASE_SECONDS
        while self._holder is not None and sysfs.pid(self.index) == self._holder:
            if time.monotonic() > deadline:
                users = occupants.users(self.path, self.index)
                raise occupants.still_used(self.path, users)
            time.sleep(BUSY_PAUSE_SECONDS)


def device_path(index: int) -> str:
    """Return the node of the device `index`."""
    return f"/dev/nbd{index}"


def while_busy(index: int | None, take: Callable[[], Taken]) -> Taken:
    """Call `take` until it does not raise EBUSY, for one second; returns what it returns.

    A device that was just released is still held for a moment, by udev's look at it.
    """
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return take()
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            if time.monotonic() > deadline:
                raise DeviceError(errno.EBUSY, _occupation(index)) from error
        time.sleep(BUSY_PAUSE_SECONDS)


def _occupation(index: int | None) -> str:
    if index is None:
        return "every /dev/nbdN is in use"
    return occupants.occupation(device_path(index), index)

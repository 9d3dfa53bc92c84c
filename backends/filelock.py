"""Keeps what a file disk stands on to that disk. Every lock ends with the open of the file.

A file that is written by one worker is locked exclusively (flock), so that other programs see it
too. Everybody else takes a shared lock: readers, and the workers that share one disk. These each
mark a byte far behind the file's end, by whom they are, and give way to the marks of others. Two
who come at the same time may both give way; they never both go on.

A block device is kept by opening it exclusively, which of the workers that share it only one can.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from typing import Final

from backends.linux import is_range_locked, lock_range, unlock_range
from reactor.errors import is_shortage
from reactor.log import logger

MARKS: Final = 1 << 62  # where the marks are: a byte for readers, then one for each shared disk
MARKS_END: Final = MARKS + (1 << 60)
CLAIMS: Final = 1 << 61  # distance from a mark to that of who has the device open exclusively
READERS: Final = MARKS

log = logger(__name__)


def mark_of(disk: str, instance: str) -> int:
    """Return where the workers that share the service's `disk` mark its file."""
    digest = hashlib.sha256(f"{instance}\0{disk}".encode()).digest()
    return MARKS + 1 + int.from_bytes(digest[:7], "big")


def lock_file(fd: int, path: str, mark: int | None) -> None:
    """Lock a regular file for its only user (None), or for all that mark it with `mark`.

    Raises OSError EBUSY when others use it.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_EX if mark is None else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        if mark is not None:
            lock_range(fd, fcntl.F_RDLCK, mark, 1)
            before, behind = (MARKS, mark - MARKS), (mark + 1, MARKS_END - mark - 1)
            if any(
                length and is_range_locked(fd, start, length) for start, length in (before, behind)
            ):
                raise BlockingIOError
    except BlockingIOError:
        raise OSError(errno.EBUSY, "is in use by another disk or service", path) from None
    except OSError as error:
        if is_shortage(error):  # another worker may have it still
            raise OSError(error.errno, error.strerror, path) from None
        log.warning("%s cannot be locked against other writers: %s", path, error.strerror)


class DeviceClaim:
    """The exclusive open (O_EXCL) of a device, which one of the workers that share it has for all.

    The claim is marked before it is made, and until it has ended. So a device that is taken while
    its mark is free is another program's, or that of a worker that is being killed right now.
    """

    def __init__(self, fd: int, path: str, mark: int) -> None:
        """Claim the device that is open as `fd`; raises OSError EBUSY, see `keep`."""
        self._device = fd
        self._path = path
        self._mark = mark + CLAIMS
        self._fd: int | None = None
        self.keep()

    def keep(self) -> None:
        """Claim the device if no worker does; raises OSError EBUSY when another program has it."""
        if self._fd is not None or not lock_range(self._device, fcntl.F_WRLCK, self._mark, 1):
            return
        try:
            # The device that is open, whatever the path may lead to by now.
            self._fd = os.open(f"/proc/self/fd/{self._device}", os.O_RDONLY | os.O_EXCL)
        except OSError as error:
            unlock_range(self._device, self._mark, 1)
            problem = error.strerror
            if error.errno == errno.EBUSY:
                problem = "is mounted, or in use by another program"
            raise OSError(error.errno, problem, self._path) from None

    def close(self) -> None:
        """End the claim, if it is this worker's; the mark ends with the open of the device."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

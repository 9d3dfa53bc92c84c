"""Keeps what a file disk stands on to that disk. Every lock ends with the open of the file.

A file that is written by one worker is locked exclusively (flock), so that other programs see it
too. Everybody else takes a shared lock: readers, and the workers that share one disk. These each
mark a byte far behind the file's end, by whom they are, and give way to the marks of others. Two
who come at the same time may both give way; they never both go on.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
from typing import Final

from backends.linux import is_range_locked, lock_range
from reactor.log import logger

MARKS: Final = 1 << 62  # where the marks are: a byte for readers, then one for each shared disk
MARKS_END: Final = MARKS + (1 << 60)
HOLDERS: Final = 1 << 61  # distance from a mark to that of who has the device open exclusively
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
        log.warning("%s cannot be locked against other writers: %s", path, error.strerror)


def hold_device(fd: int, mark: int) -> None:
    """Tell the workers that share a device that this one has it open exclusively (O_EXCL)."""
    lock_range(fd, fcntl.F_RDLCK, mark + HOLDERS, 1)


def is_device_held(fd: int, mark: int) -> bool:
    """Return whether a worker of the same disk holds the device."""
    return is_range_locked(fd, mark + HOLDERS, 1)

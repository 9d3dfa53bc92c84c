"""Locks between the workers that share a disk: who may change it for which of the kernel's queues.

A lane is held by a lock on the open of the disk's own data. So it ends when its worker ends it, or
dies; and then not with the process, but with the last I/O that the dead process left in the kernel,
which holds the open file too. Next to each lane is a place to say that someone else wishes for it.
"""

from __future__ import annotations

import fcntl
from typing import Final

from backends.linux import is_range_locked, lock_range, unlock_range
from reactor.errors import reason
from reactor.log import logger

# Behind every file's end, and before the marks of `filelock`: a byte for each lane.
LANES: Final = 1 << 61
WISHES: Final = LANES + (1 << 32)

log = logger(__name__)


class LaneLocks:
    """The locks of one open disk. Without a file, or locks on it, every lane is free here."""

    def __init__(self, fd: int | None) -> None:
        """Use the locks of the open file `fd`, which must be open for reading and writing."""
        self._fd = fd
        if fd is None:
            return
        try:
            is_range_locked(fd, LANES, 1)
        except OSError as error:
            log.warning("a request that is sent twice may be done twice: %s", reason(error))
            self._fd = None

    def take(self, lane: int) -> bool:
        """Take a lane; False while another worker has it, or it cannot be known."""
        return self._fd is None or _try_to_lock(self._fd, fcntl.F_WRLCK, LANES + lane)

    def give_up(self, lane: int) -> None:
        """Let others take a lane."""
        if self._fd is not None:
            unlock_range(self._fd, LANES + lane, 1)

    def wish(self, lane: int) -> None:
        """Ask whoever has the lane to give it up, until `wish_no_more`."""
        if self._fd is not None:
            _try_to_lock(self._fd, fcntl.F_RDLCK, WISHES + lane)

    def wish_no_more(self, lane: int) -> None:
        """Take a wish back."""
        if self._fd is not None:
            unlock_range(self._fd, WISHES + lane, 1)

    def is_wished(self, lane: int) -> bool:
        """Return whether another worker wishes for the lane."""
        return self._fd is not None and is_range_locked(self._fd, WISHES + lane, 1)


def _try_to_lock(fd: int, kind: int, place: int) -> bool:
    try:
        return lock_range(fd, kind, place, 1)
    except OSError as error:  # no memory for a lock: it is tried again
        log.warning("a lock is not to be had: %s", reason(error))
        return False

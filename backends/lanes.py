"""Locks between the workers that share a disk: who may change it for which of the kernel's queues.

A lane is held by a lock on the open of the disk's own data. So it ends when its worker ends it, or
dies; and then not with the process, but with the last I/O that the dead process left in the kernel,
which holds the open file too. Next to each lane is a place to say that someone else wishes for it.
"""

from __future__ import annotations

import errno
import fcntl
from typing import Final

from backends.linux import is_range_locked, lock_range, unlock_range
from reactor.errors import error_number, reason
from reactor.log import logger
from reactor.loop import Reactor, Timer

# Behind every file's end, and before the marks of `filelock`: a byte for each lane.
LANES: Final = 1 << 61
WISHES: Final = LANES + (1 << 32)
AGAIN_SECONDS: Final = 0.1  # from one try to give up a lock to the next

log = logger(__name__)


class LaneLocks:
    """The locks of one open disk. Without a file, or locks on it, every lane is free here.

    Calls for locks may fail: for want of memory, or whenever a network file system likes (ENOLCK,
    EIO). No method raises that. Who could not take a lock may try again; what could not be given
    up is given up later, without whoever had it.
    """

    def __init__(self, fd: int | None, reactor: Reactor, disk: str) -> None:
        """Use the locks of the open file `fd`, which must be open for reading and writing.

        `disk` names it in the log.
        """
        self._fd = fd
        self._reactor = reactor
        self._disk = disk
        self._left: set[int] = set()  # places that are still locked, though nobody needs them
        self._again: Timer | None = None
        self._failing: set[str] = set()  # what failed when it was last done
        if fd is None:
            return
        try:
            is_range_locked(fd, LANES, 1)
        except (OSError, MemoryError) as error:
            if error_number(error) == errno.ENOMEM:  # which says nothing of the file
                return
            message = "disk %s: a request that is sent twice may be done twice: %s"
            log.warning(message, disk, reason(error))
            self._fd = None

    def close(self) -> None:
        """Touch the file no more: it is about to be closed, with which all locks end."""
        if self._again is not None:
            self._again.cancel()

    def take(self, lane: int) -> bool:
        """Take a lane; False while another worker has it, or it cannot be known."""
        return self._lock(fcntl.F_WRLCK, LANES + lane)

    def give_up(self, lane: int) -> None:
        """Let others take a lane."""
        self._unlock(LANES + lane)

    def wish(self, lane: int) -> None:
        """Ask whoever has the lane to give it up, until `wish_no_more`.

        The wish may fail; it may be repeated.
        """
        self._lock(fcntl.F_RDLCK, WISHES + lane)

    def wish_no_more(self, lane: int) -> None:
        """Take a wish back."""
        self._unlock(WISHES + lane)

    def is_wished(self, lane: int) -> bool:
        """Return whether another worker wishes for the lane, or it cannot be known."""
        if self._fd is None:
            return False
        try:
            wished = is_range_locked(self._fd, WISHES + lane, 1)
        except (OSError, MemoryError) as error:
            self._note_failure("looked at", error)
            return True
        self._failing.discard("looked at")
        return wished

    def _lock(self, kind: int, place: int) -> bool:
        if self._fd is None:
            return True
        try:
            locked = lock_range(self._fd, kind, place, 1)
        except (OSError, MemoryError) as error:
            self._note_failure("taken", error)
            return False
        self._failing.discard("taken")
        if locked:
            self._left.discard(place)
        return locked

    def _unlock(self, place: int) -> None:
        if self._fd is None:
            return
        try:
            unlock_range(self._fd, place, 1)
        except (OSError, MemoryError) as error:
            self._unlock_later(place, error)
        else:
            self._failing.discard("given up")
            self._left.discard(place)

    def _unlock_later(self, place: int, error: OSError | MemoryError) -> None:
        try:
            self._left.add(place)
            if self._again is None:
                self._again = self._reactor.call_later(AGAIN_SECONDS, self._unlock_again)
            self._note_failure("given up", error)
        except MemoryError:
            self._reactor.lose()  # other workers would wait for the place for ever

    def _unlock_again(self) -> None:
        self._again = None
        for place in tuple(self._left):
            self._unlock(place)

    def _note_failure(self, done: str, error: BaseException) -> None:
        """Tell that a lock could not be `done`; once, until it can be."""
        if done not in self._failing:
            self._failing.add(done)
            message = "disk %s: a lock on its data cannot be %s now, which is tried again: %s"
            log.warning(message, self._disk, done, reason(error))

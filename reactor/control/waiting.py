"""What keeps a disk from being opened for now, and how long that may be awaited."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from reactor.errors import SHORTAGES, error_number, reason

BRIEF_SECONDS: Final = 60.0  # for what a disk can do without
# EBUSY: what a dead worker had begun keeps its file until the medium has done it.
AWAITED: Final = (*SHORTAGES, errno.EBUSY)


class Waiting:
    """Something that must happen first, or a shortage that must pass."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._hindrance = self._shortage = ""
        self._clock = clock
        self._since_ns = 0

    @property
    def reason(self) -> str:
        """What is awaited, for the operator; empty: nothing."""
        return self._hindrance or self._shortage

    def bears(self, error: Exception, seconds: float) -> bool:
        """Whether `error` may pass, and it is no longer since the first that did."""
        if error_number(error) not in AWAITED:
            return False
        self._shortage = reason(error)
        return self._lasts(seconds)

    def holds(self, hindrance: str, *, briefly: bool) -> bool:
        """Note `hindrance`, if there is any; whether to wait for its end, or have done so."""
        self._hindrance = hindrance
        return bool(hindrance) and (not briefly or self._lasts(BRIEF_SECONDS))

    def end(self) -> None:
        """Note that the disk is what it should be."""
        self._hindrance = self._shortage = ""
        self._since_ns = 0

    def _lasts(self, seconds: float) -> bool:
        now = self._clock()
        self._since_ns = self._since_ns or now
        return now - self._since_ns < seconds * 1e9

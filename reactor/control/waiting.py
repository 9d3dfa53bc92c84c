"""What keeps a disk from being opened for now, and how long that may be awaited."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from reactor.errors import SHORTAGES, error_number, reason

# EBUSY: what a dead worker had begun keeps its file until the medium has done it.
AWAITED: Final = (*SHORTAGES, errno.EBUSY)


class Waiting:
    """`hindrance`: what must happen before the disk is opened."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self.hindrance = self._shortage = ""
        self._clock = clock
        self._since_ns = 0

    @property
    def reason(self) -> str:
        """What is awaited, for the operator; empty: nothing."""
        return self.hindrance or self._shortage

    def bears(self, error: Exception, seconds: float) -> bool:
        """Whether `error` may pass, and it is no longer since the first that did."""
        if error_number(error) not in AWAITED:
            return False
        self._shortage = reason(error)
        now = self._clock()
        self._since_ns = self._since_ns or now
        return now - self._since_ns < seconds * 1e9

    def end(self) -> None:
        """Note that the disk is what it should be."""
        self.hindrance = self._shortage = ""
        self._since_ns = 0

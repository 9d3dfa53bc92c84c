"""Tells how long the storage of a disk takes, in time to do something about it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from backends.engine import Engine
from reactor.log import logger

SLOW_SECONDS: Final = 5.0  # what takes so long is worth a line in the log
REPORT_SECONDS: Final = 60.0  # from one such line to the next of the same disk

log = logger(__name__)


class _Oldest:
    """How long the oldest operation of an engine is in flight, as far as looks can tell."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._number = 0  # of the oldest operation
        self._since_ns = 0  # it began before that
        self._last = 0  # the number of the last operation, at the last look
        self._looked_ns = 0

    def look(self, now: int) -> int:
        """Return for how many ns it is in flight, at least; 0 when nothing is known to be."""
        engine = self._engine
        number = next(iter(engine.tags), 0)
        if number != self._number:
            self._number = number
            self._since_ns = self._looked_ns if number <= self._last else now
        self._last, self._looked_ns = engine.number, now
        return now - self._since_ns if number else 0


class Slowness:
    """Looks at the engines of a disk now and then, and tells the operator when they are slow.

    Costs the operations nothing: they are numbered, and their numbers are looked at.
    """

    def __init__(self, disk: str, clock: Callable[[], int], engines: Sequence[Engine]) -> None:
        self._disk = disk
        self._clock = clock
        self._engines = engines
        self._oldest = [_Oldest(engine) for engine in engines]
        self._reported = False  # that it is slow, but not that it no longer is
        self._quiet_until = 0

    def look(self) -> bool:
        """Return whether something has been in flight since the last look."""
        now = self._clock()
        age = max(oldest.look(now) for oldest in self._oldest)
        if age >= SLOW_SECONDS * 1e9:
            waiting = sum(engine.in_flight for engine in self._engines)
            self.report(age, f"has not answered for {age / 1e9:.0f} s; in flight: {waiting}")
        elif self._reported:
            self._reported = False
            log.warning("disk %s: its storage answers again", self._disk)
        return age > 0

    def report(self, ns: int, what: str) -> None:
        """Tell that the storage took so many ns: now and then, and only if that is long."""
        now = self._clock()
        if ns >= SLOW_SECONDS * 1e9 and now >= self._quiet_until:
            self._quiet_until = now + int(REPORT_SECONDS * 1e9)
            self._reported = True
            log.warning("disk %s: its storage %s", self._disk, what)

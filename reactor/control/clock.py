"""Time, as a process knows it that may be stopped."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

PAUSE_NS: Final = 3_000_000_000  # the loop looks at the clock once a second


class WakingClock:
    """Nanoseconds of a monotonic clock, without those in which its process did not run.

    Who was stopped (SIGSTOP, a frozen cgroup, swapping) has heard from nobody meanwhile: it must
    blame nobody for that when it goes on, nor take deadlines for over. Of a pause only `PAUSE_NS`
    count.
    """

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._read_ns = clock()
        self._lost_ns = 0

    def __call__(self) -> int:
        now = self._clock()
        if now - self._read_ns > PAUSE_NS:
            self._lost_ns += now - self._read_ns - PAUSE_NS
        self._read_ns = now
        return now - self._lost_ns

"""What a controller that was stopped takes for the time."""

from __future__ import annotations

from reactor.control.clock import WakingClock

SECOND = 1_000_000_000


def test_time_passes_as_it_does() -> None:
    times = iter((5, 6, 6, 8, 11))
    clock = WakingClock(lambda: next(times) * SECOND)
    assert [clock() // SECOND for _ in range(4)] == [6, 6, 8, 11]


def test_a_pause_counts_for_little() -> None:
    times = iter((5, 6, 36, 37, 67, 68))
    clock = WakingClock(lambda: next(times) * SECOND)
    assert [clock() // SECOND for _ in range(5)] == [6, 9, 10, 13, 14]

"""When cyclic garbage is searched for."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from reactor.data import garbage
from reactor.loop import Reactor

if TYPE_CHECKING:  # at run time a plugin, which nobody may import before pytest
    from tests.unit.looping import Clock

pytest_plugins = ["tests.unit.looping"]
Search = Callable[..., list[int]]


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch, clock: Clock, make: Callable[..., Reactor]) -> Search:
    """Returns the generations of the first searches of a worker that works, or does not."""
    found: list[int] = []
    reactor = make()
    for name in ("freeze", "disable"):
        monkeypatch.setattr(gc, name, lambda: None)

    def search(*, busy: bool, periods: int, young: int = 0, took: float = 0) -> list[int]:
        def collect(generation: int = 2) -> None:
            found.append(generation)
            clock.now += int(took * 1e9)

        monkeypatch.setattr(gc, "collect", collect)
        monkeypatch.setattr(gc, "get_count", lambda: (young, 0, 0))
        garbage.collect_by_timer(reactor)
        found.clear()
        for _ in range(periods):
            clock.now += int(garbage.COLLECT_SECONDS * 1e9)
            reactor.busy_ns += garbage.IDLE_NS * busy
            reactor.turn()
        return found

    return search


def test_a_worker_that_works_searches_what_is_young(searches: Search) -> None:
    found = searches(busy=True, periods=2 * (garbage.LATEST + 1))
    assert found == ([garbage.YOUNG] * garbage.LATEST + [2]) * 2


def test_a_worker_that_does_nothing_searches_everything(searches: Search) -> None:
    assert searches(busy=False, periods=5) == [2] * 5


def test_replies_that_wait_for_their_readers_are_not_searched(searches: Search) -> None:
    found = searches(busy=True, periods=garbage.LATEST + 1, young=garbage.YOUNG_MAX + 1)
    assert found == [2]


def test_searches_that_take_long_are_rare(searches: Search) -> None:
    assert searches(busy=False, periods=100, took=0.045) == [2] * 12  # in 500 s

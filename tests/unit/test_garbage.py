"""When cyclic garbage is searched for."""

from __future__ import annotations

import gc

import pytest

from reactor.data import garbage
from reactor.loop import Reactor
from tests.unit.looping import Clock, Poll


def searches(monkeypatch: pytest.MonkeyPatch, *, busy: bool, count: int) -> list[int]:
    """Return the generations of the first searches of a worker that works, or does not."""
    found: list[int] = []
    clock = Clock()
    reactor = Reactor("interrupt", clock=clock, poll=Poll(clock))
    for name in ("freeze", "disable"):
        monkeypatch.setattr(gc, name, lambda: None)
    monkeypatch.setattr(gc, "collect", lambda generation=2: found.append(generation))
    garbage.collect_by_timer(reactor)
    found.clear()
    while len(found) < count:
        clock.now += int(garbage.COLLECT_SECONDS * 1e9)
        reactor.busy_ns += garbage.IDLE_NS * busy
        reactor.turn()
    reactor.close()
    return found


def test_a_worker_that_works_searches_what_is_young(monkeypatch: pytest.MonkeyPatch) -> None:
    found = searches(monkeypatch, busy=True, count=2 * (garbage.LATEST + 1))
    assert found == ([garbage.YOUNG] * garbage.LATEST + [2]) * 2


def test_a_worker_that_does_nothing_searches_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    assert searches(monkeypatch, busy=False, count=5) == [2] * 5

"""The fence when calls for locks fail, as they may on a network file system or without memory."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import lanes
from reactor.data.fence import FencedConnection, Lanes
from reactor.data.serving import ServedDisk
from reactor.loop import Reactor
from reactor.spec import DiskSpec
from tests.submitting import turn_until
from tests.unit.fencing import LANE, OTHER, Bed, shut, write

NO_MEMORY = [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), MemoryError()]
LOCK, UNLOCK, LOOK = "lock_range", "unlock_range", "is_range_locked"


class Locks:
    """The system's locks, of which the calls named in `failing` fail; `failures` counts those."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing: set[str] = set()
        self.failures = 0
        self.error: Exception = OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        for name in (LOCK, UNLOCK, LOOK):
            monkeypatch.setattr(lanes, name, self._call(name, getattr(lanes, name)))

    def _call(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if name in self.failing:
                self.failures += 1
                raise self.error
            return real(*arguments)

        return call


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Locks:
    return Locks(monkeypatch)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path / "data")
    with made.stack:
        yield made


def test_a_look_at_wishes_that_fails_leaves_no_lane_held(bed: Bed, locks: Locks) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    locks.failing.add(LOOK)
    bed.until(lambda: locks.failures)
    locks.failing.clear()
    second.send(write(LANE, sent=2))
    bed.a_while()
    assert not held.submitted
    slow.finish()
    bed.until(lambda: held.submitted)


def test_a_look_that_fails_for_another_reason_is_repeated(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    failures: list[int] = []

    def fail(_lanes: Lanes, lane: int) -> bool:
        failures.append(lane)
        raise MemoryError

    with monkeypatch.context() as failing:
        failing.setattr(Lanes, "is_wished", fail)
        first.send(write(LANE))
        bed.until(lambda: failures)
    second.send(write(LANE, sent=2))
    slow.finish()
    bed.until(lambda: held.submitted)


def test_who_cannot_know_of_wishes_gives_its_lanes_up(bed: Bed, locks: Locks) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(write(LANE, 1))
    bed.until(lambda: slow.pending)
    locks.failing.add(LOOK)
    bed.until(lambda: locks.failures)
    second.send(write(LANE, 2))
    first.send(write(LANE, 3))
    bed.a_while()
    assert len(slow.submitted) == 1
    slow.finish()
    bed.until(lambda: held.submitted)


class FullDict(dict[int, FencedConnection]):
    """A dict for which there is no memory."""

    def __setitem__(self, *_: object) -> None:
        raise MemoryError


def test_a_lane_that_there_is_no_memory_to_note_is_not_kept_from_others(bed: Bed) -> None:
    lanes = bed.open()
    first, _ = bed.connection(lanes)
    second, held = bed.worker()
    lanes._holders = FullDict()
    first.send(write(LANE))
    bed.until(lambda: first.closed)
    second.send(write(LANE, sent=2))
    bed.until(lambda: held.submitted)


@pytest.mark.parametrize("memory", [True, False])
def test_a_lane_that_cannot_be_given_up_is_given_up_later(
    bed: Bed, locks: Locks, *, memory: bool
) -> None:
    if not memory:
        locks.error = MemoryError()
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(write(LANE) + write(OTHER))
    bed.until(lambda: len(slow.pending) == 2)
    second.send(write(LANE, sent=2) + write(OTHER, sent=2))
    locks.failing.add(UNLOCK)
    slow.finish_all()
    bed.a_while()
    assert not held.submitted
    shut(first)
    bed.until(lambda: first.closed)
    locks.failing.clear()
    bed.until(lambda: len(held.submitted) == 2)


def test_nothing_is_begun_without_the_lane_after_it_could_not_be_given_up(
    bed: Bed, locks: Locks
) -> None:
    shared = bed.open()
    first, firsts = bed.connection(shared)
    second, seconds = bed.connection(shared)
    first.send(write(LANE, 1))
    bed.until(lambda: firsts.pending)
    locks.failing.add(UNLOCK)
    firsts.finish()
    bed.until(lambda: locks.failures)
    locks.failing.clear()
    second.send(write(LANE, 2))
    bed.until(lambda: seconds.pending)
    first.send(write(LANE, 3))
    bed.a_while()
    assert len(firsts.submitted) == 1, "the other connection of the worker has it now"
    other = bed.open()
    assert not other._locks.take(LANE), "it is given up by who has it, not behind its back"
    seconds.finish()
    bed.until(lambda: len(firsts.submitted) == 2)


def test_a_wish_that_failed_is_repeated(bed: Bed, locks: Locks) -> None:
    first, slow = bed.worker()
    second, _ = bed.worker()
    third = bed.open()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    locks.failing.add(LOCK)
    second.send(write(LANE, sent=2))
    bed.until(lambda: locks.failures >= 2)  # the lane, and the wish for it
    assert not third.is_wished(LANE)
    locks.failing.clear()
    bed.until(lambda: third.is_wished(LANE))


def test_a_wish_that_cannot_be_taken_back_is_taken_back_later(bed: Bed, locks: Locks) -> None:
    first, slow = bed.worker()
    second, _ = bed.worker()
    third = bed.open()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    second.send(write(LANE, sent=2))
    bed.until(lambda: third.is_wished(LANE))
    locks.failing.add(UNLOCK)
    second.client.close()
    bed.until(lambda: second.closed)
    assert third.is_wished(LANE)
    locks.failing.clear()
    bed.until(lambda: not third.is_wished(LANE))


@pytest.mark.parametrize(
    ("call", "done"), [(LOCK, "taken"), (UNLOCK, "given up"), (LOOK, "looked at")]
)
def test_a_failure_is_told_once_until_it_works_again(
    bed: Bed, locks: Locks, caplog: pytest.LogCaptureFixture, call: str, done: str
) -> None:
    shared = bed.open()._locks
    for told in (1, 2):
        locks.failing = {call}
        for _ in range(10):
            shared.take(LANE)
            shared.is_wished(LANE)
            shared.give_up(LANE)
        locks.failing.clear()
        text = f"disk disk: a lock on its data cannot be {done} now, which is tried again: No locks"
        assert caplog.text.count(text) == len(caplog.records) == told
        shared.take(LANE)
        shared.is_wished(LANE)
        shared.give_up(LANE)


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_want_of_memory_when_the_disk_is_opened_does_not_end_its_locks(
    bed: Bed, locks: Locks, error: Exception
) -> None:
    locks.failing.add(LOOK)
    locks.error = error
    first = bed.open()._locks
    locks.failing.clear()
    second = bed.open()._locks
    assert first.take(LANE)
    assert not second.take(LANE)


def test_a_closed_disk_touches_no_lock_any_more(
    tmp_path: Path, locks: Locks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lanes, "AGAIN_SECONDS", 0.001)
    path = tmp_path / "data"
    path.write_bytes(bytes(1 << 20))
    ended: list[object] = []
    reactor = Reactor("poll")
    spec = DiskSpec("disk", "file", {"path": str(path)}, connections=2)
    disk = ServedDisk(
        *(reactor, spec, "test"),
        shared=True,
        least=0,
        on_removed=lambda *_: None,
        on_disconnected=lambda *_: None,
    )
    ours, theirs = socket.socketpair()
    disk.serve(theirs, 1)
    ours.sendall(write(LANE))
    locks.failing.add(UNLOCK)
    turn_until(reactor, lambda: locks.failures >= 3)
    ours.close()
    disk.stop(1, lambda: ended.append(True))
    turn_until(reactor, lambda: ended)
    before = locks.failures
    waited: list[object] = []
    reactor.call_later(0.05, lambda: waited.append(True))
    turn_until(reactor, lambda: waited)
    reactor.close()
    assert locks.failures == before

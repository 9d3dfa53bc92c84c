"""A slow storage is noticed by its oldest operation, and told once a minute at most."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest

from backends.slowness import Slowness
from backends.threads import Threads
from reactor.loop import Reactor
from tests.submitting import turn_until

SECOND = 10**9


class Storage:
    """An engine whose operations end when the test says so."""

    def __init__(self) -> None:
        self.now = 0
        self.reactor = Reactor("interrupt")
        self.engine = Threads(self.reactor, -1, lambda: None, threads=1)
        self.slowness = Slowness("disk", lambda: self.now, [self.engine])
        self.writers: list[int] = []

    def begin(self) -> None:
        reader, writer = os.pipe()
        self.writers.append(writer)

        def wait() -> None:
            os.read(reader, 1)
            os.close(reader)

        self.engine.call(wait, (), (lambda *_: None,))
        self.reactor.turn()

    def end(self) -> None:
        left = self.engine.in_flight - 1
        os.close(self.writers.pop(0))
        turn_until(self.reactor, lambda: self.engine.in_flight == left)

    def look(self, seconds: float) -> bool:
        self.now += int(seconds * SECOND)
        return self.slowness.look()


@pytest.fixture
def storage() -> Iterator[Storage]:
    storage = Storage()
    yield storage
    while storage.writers:
        storage.end()
    storage.engine.close()
    storage.reactor.close()


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    told = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return told


def test_what_a_look_has_seen_and_the_next_one_sees_again_is_slow(storage: Storage) -> None:
    assert not storage.look(1)
    storage.begin()
    assert not storage.look(1), "it may have begun just now"
    assert storage.look(1)
    storage.begin()
    storage.end()
    assert storage.look(1) is False, "the next one began after the last look"
    assert storage.look(1)
    storage.end()
    assert not storage.look(1)


def test_a_storage_that_hangs_is_told_now_and_then_and_its_return_once(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    storage.look(0)
    storage.begin()
    for _ in range(5):
        storage.look(1)
    assert lines(caplog) == []
    storage.look(1)
    told = ["disk disk: its storage has not answered for 5 s; in flight: 1"]
    assert lines(caplog) == told
    for _ in range(59):
        storage.look(1)
    assert lines(caplog) == []
    storage.look(1)
    assert lines(caplog) == [told[0].replace("5 s", "65 s")]
    storage.end()
    storage.look(1)
    storage.look(1)
    assert lines(caplog) == ["disk disk: its storage answers again"]


def test_operations_that_follow_each_other_are_not_taken_for_one(
    storage: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(10):
        storage.begin()
        storage.look(2)
        storage.begin()
        storage.end()
        storage.look(2)
        storage.end()
    assert lines(caplog) == []

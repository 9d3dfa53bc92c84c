"""A loop whose clock and poll function are the test's."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from reactor.loop import Mode, Reactor


class Clock:
    """Time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 1_000_000_000

    def __call__(self) -> int:
        return self.now


class Poll:
    """A poll function that notes how long it may wait, and returns what the test has set."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.waits: list[float] = []
        self.ready: list[tuple[int, int]] = []
        self.takes_ns = 0

    def __call__(self, seconds: float) -> Sequence[tuple[int, int]]:
        self.waits.append(seconds)
        self.clock.now += self.takes_ns
        ready, self.ready = self.ready, []
        return ready


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def poll(clock: Clock) -> Poll:
    return Poll(clock)


@pytest.fixture
def make(clock: Clock, poll: Poll) -> Iterator[Callable[..., Reactor]]:
    made: list[Reactor] = []

    def reactor(
        mode: Mode = "interrupt", *, on_loss: Callable[[], object] = lambda: None
    ) -> Reactor:
        made.append(Reactor(mode, clock=clock, poll=poll, on_loss=on_loss))
        return made[-1]

    yield reactor
    for one in made:
        one.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def real() -> Iterator[Reactor]:
    reactor = Reactor("interrupt")
    yield reactor
    reactor.close()

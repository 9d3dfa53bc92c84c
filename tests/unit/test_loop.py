"""The loop: what is called when, whose time it was, and when it sleeps."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from reactor.loop import (
    NEVER,
    READABLE,
    SPIN_MISSES_MAX,
    SPIN_NS,
    SPIN_REST,
    WRITABLE,
    Reactor,
)

if TYPE_CHECKING:  # pytest must be the first to import it
    from tests.unit.looping import Clock, Poll

pytest_plugins = ["tests.unit.looping"]

MS = 1_000_000

# --- sleeping and spinning ---


def test_interrupt_mode_sleeps_for_ever_when_nothing_is_due(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make("interrupt")
    assert not reactor.turn()
    assert poll.waits == [NEVER]


def test_poll_mode_never_sleeps(make: Callable[..., Reactor], poll: Poll) -> None:
    reactor = make("poll")
    reactor.turn()
    reactor.turn()
    assert poll.waits == [0, 0]


class Answer:
    """A connection that has something to send, or has not."""

    flush_due = kick_due = False

    def __init__(self, *, sends: bool = True) -> None:
        self.sends = sends

    def flush(self) -> bool:
        return self.sends


def test_adaptive_mode_spins_for_a_bounded_time_after_an_answer(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make("adaptive")
    reactor.mark_flush(Answer())
    reactor.turn()
    poll.takes_ns = SPIN_NS // 4
    for _ in range(6):
        reactor.turn()
    assert poll.waits == [0, 0, 0, 0, 0, NEVER, NEVER]


def test_adaptive_mode_does_not_spin_after_work_that_nobody_was_told_of(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make("adaptive")
    reactor.mark_flush(Answer())
    reactor.turn()
    reactor.call_from_thread(lambda: None)  # while it spins
    reactor.mark_flush(Answer(sends=False))
    reactor.turn()
    reactor.turn()
    assert poll.waits == [0, 0, NEVER]


def _spins(reactor: Reactor, poll: Poll) -> bool:
    """Answer; returns whether the loop looks again before it sleeps."""
    reactor.mark_flush(Answer())
    reactor.turn()
    poll.waits.clear()
    poll.takes_ns = SPIN_NS
    reactor.turn()
    reactor.turn()
    poll.takes_ns = 0
    return poll.waits == [0, NEVER]


def test_spinning_in_vain_ends_for_a_while_and_is_tried_again(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make("adaptive")
    expected = [True] * SPIN_MISSES_MAX + [False] * (SPIN_REST - 1) + [True]
    assert [_spins(reactor, poll) for _ in expected] == expected
    again = [False] * (SPIN_REST - 1) + [True]
    assert [_spins(reactor, poll) for _ in again] == again


def test_what_comes_while_it_spins_keeps_it_spinning(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make("adaptive")
    for _ in range(SPIN_MISSES_MAX * 2):
        for _ in range(SPIN_MISSES_MAX - 1):
            assert _spins(reactor, poll)
        reactor.mark_flush(Answer())
        reactor.turn()
        poll.waits.clear()
        reactor.call_from_thread(lambda: None)
        reactor.turn()
        assert poll.waits == [0]


def test_adaptive_mode_does_not_spin_after_a_handler_that_did_nothing(
    make: Callable[..., Reactor], poll: Poll, pair: tuple[socket.socket, socket.socket]
) -> None:
    reactor = make("adaptive")
    reactor.add_fd(pair[0].fileno(), lambda _: False, name="idle")
    poll.ready = [(pair[0].fileno(), READABLE)]
    assert not reactor.turn()
    reactor.turn()
    assert poll.waits == [NEVER, NEVER]


def test_a_timer_ends_the_sleep(make: Callable[..., Reactor], poll: Poll, clock: Clock) -> None:
    reactor = make()
    fired: list[int] = []
    reactor.call_later(0.5, lambda: fired.append(clock.now))
    reactor.turn()
    assert poll.waits == [pytest.approx(0.5)]
    assert not fired
    clock.now += 500 * MS
    assert reactor.turn()
    assert len(fired) == 1
    reactor.turn()
    assert poll.waits[-1] == NEVER


def test_a_poller_is_armed_before_the_sleep_and_what_came_meanwhile_prevents_it(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make()
    came = [False, True, False]
    reactor.add_poller(lambda: False, name="queue", before_sleep=lambda: came.pop(0))
    for _ in range(3):
        reactor.turn()
    assert poll.waits == [NEVER, 0, NEVER]


def test_a_poller_without_a_wake_up_keeps_the_loop_awake(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make()
    poller = reactor.add_poller(lambda: False, name="busy")
    reactor.turn()
    reactor.remove_poller(poller)
    reactor.turn()
    assert poll.waits == [0, NEVER]


def test_what_the_last_turn_left_prevents_the_sleep(
    make: Callable[..., Reactor], poll: Poll
) -> None:
    reactor = make()

    class Again:
        flush_due = kick_due = False
        left = 2

        def flush(self) -> bool:
            if self.left:
                self.left -= 1
                reactor.mark_flush(self)
            return False

    reactor.mark_flush(Again())
    for _ in range(4):
        reactor.turn()
    assert poll.waits == [0, 0, 0, NEVER]


# --- accounts ---


def test_time_is_busy_from_the_wait_to_the_end_of_a_turn_that_did_work(
    make: Callable[..., Reactor],
    poll: Poll,
    clock: Clock,
    pair: tuple[socket.socket, socket.socket],
) -> None:
    reactor = make("poll")

    class Slow:
        flush_due = kick_due = False

        def flush(self) -> bool:
            clock.now += 2 * MS
            return True

    def work(_events: int) -> bool:
        clock.now += 3 * MS
        reactor.mark_flush(Slow())
        return True

    def look() -> bool:
        clock.now += 1 * MS
        return False

    reactor.add_fd(pair[0].fileno(), work, name="socket")
    reactor.add_poller(look, name="looker")
    poll.takes_ns = 5 * MS
    poll.ready = [(pair[0].fileno(), READABLE)]
    assert reactor.turn()
    assert reactor.busy_ns == (3 + 1 + 2) * MS
    assert not reactor.turn()
    assert not reactor.turn()
    assert reactor.busy_ns == (3 + 1 + 2) * MS
    assert reactor.idle_ns == (5 + 5 + 1 + 5) * MS  # the last turn's own is entered by the next
    assert reactor.turns == 3


def test_a_timer_that_was_cancelled_is_no_work(make: Callable[..., Reactor], clock: Clock) -> None:
    reactor = make("poll")
    reactor.call_later(0, lambda: None).cancel()
    assert not reactor.turn()
    assert reactor.busy_ns == 0


# --- bounded turns ---


def test_a_call_that_calls_again_waits_for_the_next_turn(make: Callable[..., Reactor]) -> None:
    reactor = make("poll")
    calls: list[int] = []

    def again() -> None:
        calls.append(reactor.turns)
        reactor.call_from_thread(again)

    reactor.call_from_thread(again)
    for _ in range(3):
        reactor.turn()
    assert calls == [0, 1, 2]


def test_a_timer_of_no_time_waits_for_the_next_turn(make: Callable[..., Reactor]) -> None:
    reactor = make("poll")
    fired: list[int] = []

    def again() -> None:
        fired.append(reactor.turns)
        reactor.call_later(0, again)

    reactor.call_later(0, again)
    for _ in range(3):
        reactor.turn()
    assert fired == [0, 1, 2]


def test_kicks_come_before_flushes_and_each_once(make: Callable[..., Reactor]) -> None:
    reactor = make("poll")
    order: list[str] = []

    class Both:
        flush_due = kick_due = False

        def kick(self) -> None:
            order.append("kick")
            reactor.mark_flush(self)

        def flush(self) -> bool:
            order.append("flush")
            return True

    both = Both()
    reactor.mark_flush(both)
    reactor.mark_kick(both)
    reactor.mark_kick(both)
    reactor.turn()
    reactor.turn()
    assert order == ["kick", "flush"]


def test_timers_fire_in_the_order_of_their_deadlines(
    make: Callable[..., Reactor], clock: Clock
) -> None:
    reactor = make("poll")
    fired: list[str] = []
    for seconds, name in ((0.3, "c"), (0.1, "a"), (0.2, "b"), (0.1, "a2")):
        reactor.call_later(seconds, lambda name=name: fired.append(name))
    clock.now += 1000 * MS
    reactor.turn()
    assert fired == ["a", "a2", "b", "c"]


@pytest.mark.parametrize("when", ["before", "by an earlier timer", "inside"])
def test_a_cancelled_timer_does_not_fire(
    make: Callable[..., Reactor], clock: Clock, when: str
) -> None:
    reactor = make("poll")
    fired: list[str] = []
    if when == "by an earlier timer":

        def cancel() -> None:
            timer.cancel()

        reactor.call_later(0.1, cancel)

    def fire() -> None:
        fired.append("fired")
        timer.cancel()

    timer = reactor.call_later(0.1, fire)
    if when == "before":
        timer.cancel()
    clock.now += 1000 * MS
    reactor.turn()
    reactor.turn()
    assert fired == (["fired"] if when == "inside" else [])


# --- descriptors ---


def test_a_removed_descriptor_is_not_called_in_the_same_turn(
    make: Callable[..., Reactor], poll: Poll, pair: tuple[socket.socket, socket.socket]
) -> None:
    reactor = make("poll")
    first, second = pair[0].fileno(), pair[1].fileno()
    called: list[int] = []

    def remove(_events: int) -> bool:
        called.append(first)
        reactor.remove_fd(second)
        return True

    reactor.add_fd(first, remove, name="first")
    reactor.add_fd(second, lambda _: bool(called.append(second)), name="second")
    poll.ready = [(first, READABLE), (second, READABLE)]
    reactor.turn()
    assert called == [first]


def test_a_new_file_under_an_old_number_gets_no_old_event(
    make: Callable[..., Reactor], poll: Poll, pair: tuple[socket.socket, socket.socket]
) -> None:
    reactor = make("poll")
    first, second = pair[0].fileno(), pair[1].fileno()
    called: list[str] = []

    def reuse(_events: int) -> bool:
        reactor.remove_fd(second)
        reactor.add_fd(second, lambda _: bool(called.append("new")), name="new")
        return True

    reactor.add_fd(first, reuse, name="first")
    reactor.add_fd(second, lambda _: bool(called.append("old")), name="old")
    poll.ready = [(first, READABLE), (second, READABLE)]
    reactor.turn()
    assert called == []
    poll.ready = [(second, READABLE)]
    reactor.turn()
    assert called == ["new"]


def test_epoll_reports_what_is_asked_for(
    real: Reactor, pair: tuple[socket.socket, socket.socket]
) -> None:
    seen: list[int] = []
    fd = pair[0].fileno()

    def note(events: int) -> bool:
        seen.append(events)
        return True

    real.add_fd(fd, note, name="socket")
    pair[1].send(b"x")
    real.turn()
    real.modify_fd(fd, WRITABLE)
    real.turn()
    assert seen == [READABLE, WRITABLE]
    real.remove_fd(fd)

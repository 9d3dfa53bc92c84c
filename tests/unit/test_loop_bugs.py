"""What a bug in a handler does, and what reaches the loop from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import pytest

from reactor.loop import FAILURES_MAX, READABLE, Mode, Reactor

if TYPE_CHECKING:  # pytest must be the first to import it
    from tests.unit.looping import Poll

MORE_THAN_A_PIPE_HOLDS = 70_000

pytest_plugins = ["tests.unit.looping"]


class Bug(Exception):
    """What no handler should raise."""


def failing(*_: object) -> bool:
    raise Bug


def test_a_bug_in_a_handler_is_logged_and_the_others_run(
    make: Callable[..., Reactor],
    poll: Poll,
    pair: tuple[socket.socket, socket.socket],
    caplog: pytest.LogCaptureFixture,
) -> None:
    reactor = make("poll")
    called: list[str] = []

    class Broken:
        flush_due = kick_due = False
        kick = flush = failing

    class Sound:
        flush_due = kick_due = False

        def kick(self) -> None:
            called.append("kick")

        def flush(self) -> bool:
            called.append("flush")
            return True

    sound = Sound()
    reactor.add_fd(pair[0].fileno(), failing, name="broken socket")
    reactor.add_fd(pair[1].fileno(), lambda _: bool(called.append("fd")), name="sound")
    reactor.add_poller(failing, name="broken poller")
    reactor.add_poller(lambda: bool(called.append("poller")), name="sound")
    reactor.call_later(0, failing)
    reactor.call_later(0, lambda: called.append("timer"))
    reactor.call_from_thread(failing)
    reactor.call_from_thread(lambda: called.append("call"))
    for one in (Broken(), sound):
        reactor.mark_kick(one)
        reactor.mark_flush(one)
    poll.ready = [(pair[0].fileno(), READABLE), (pair[1].fileno(), READABLE)]
    reactor.turn()
    assert called == ["fd", "poller", "timer", "call", "kick", "flush"]
    assert caplog.text.count("Traceback") == 6
    assert "broken socket" in caplog.text


def test_a_handler_that_fails_again_and_again_is_called_no_more(
    make: Callable[..., Reactor], poll: Poll, pair: tuple[socket.socket, socket.socket]
) -> None:
    reactor = make("poll")
    fd = pair[0].fileno()
    called: list[str] = []

    def fail(name: str) -> bool:
        called.append(name)
        return failing()

    reactor.add_fd(fd, lambda _: fail("socket"), name="broken socket")
    reactor.add_poller(lambda: fail("poller"), name="broken poller")
    for _ in range(FAILURES_MAX * 2):
        poll.ready = [(fd, READABLE)]
        reactor.turn()
    assert called.count("socket") == FAILURES_MAX
    assert called.count("poller") == FAILURES_MAX


def test_a_handler_that_fails_now_and_then_is_kept(
    make: Callable[..., Reactor], poll: Poll, pair: tuple[socket.socket, socket.socket]
) -> None:
    reactor = make("poll")
    outcomes = iter([False, True] * FAILURES_MAX * 2)

    def sometimes(_events: int) -> bool:
        return True if next(outcomes) else failing()

    reactor.add_fd(pair[0].fileno(), sometimes, name="moody")
    for _ in range(FAILURES_MAX * 4):
        poll.ready = [(pair[0].fileno(), READABLE)]
        reactor.turn()
    assert next(outcomes, None) is None  # called every time


# --- no memory ---


def lacking(*_: object) -> bool:
    raise MemoryError


class Lacking:
    flush_due = kick_due = False
    kick = flush = lacking


@pytest.mark.parametrize("what", ["kick", "flush", "call", "timer", "poller", "descriptor"])
def test_what_lacked_memory_is_lost_and_nothing_is_called_off(
    make: Callable[..., Reactor],
    poll: Poll,
    pair: tuple[socket.socket, socket.socket],
    what: str,
) -> None:
    lost: list[str] = []
    reactor = make("poll", on_loss=lambda: lost.append(what))
    fd = pair[0].fileno()
    begin: dict[str, Callable[[], object]] = {
        "kick": lambda: reactor.mark_kick(Lacking()),
        "flush": lambda: reactor.mark_flush(Lacking()),
        "call": lambda: reactor.call_from_thread(lacking),
        "timer": lambda: reactor.call_later(0, lacking),
        "poller": lambda: reactor.add_poller(lacking, name="poller"),
        "descriptor": lambda: reactor.add_fd(fd, lacking, name="descriptor"),
    }
    begin[what]()
    turns = FAILURES_MAX * 2 if what in ("poller", "descriptor") else 1
    for _ in range(turns):
        poll.ready = [(fd, READABLE)]
        reactor.turn()
    assert lost == [what] * turns


# --- other threads and signals ---


def test_a_call_from_a_thread_wakes_the_sleeping_loop(real: Reactor) -> None:
    thread = threading.Thread(target=lambda: real.call_from_thread(real.stop))
    real.call_later(60, lambda: pytest.fail("it slept on"))
    thread.start()
    real.run()
    thread.join()


def test_a_signal_wakes_the_sleeping_loop_and_is_handled_inside_it(real: Reactor) -> None:
    real.add_signal(signal.SIGUSR1, real.stop)
    real.call_later(60, lambda: pytest.fail("it slept on"))
    timer = threading.Timer(0.01, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    timer.start()
    real.run()
    timer.join()


def test_a_flood_of_signals_is_handled_once_a_turn(real: Reactor) -> None:
    """Each that interrupts the handler of the one before would take some of the stack."""
    turns: list[int] = []
    real.add_signal(signal.SIGUSR1, lambda: turns.append(real.turns))
    flood = subprocess.Popen(
        [sys.executable, "-c", f"import os\nwhile True: os.kill({os.getpid()}, {signal.SIGUSR1:d})"]
    )
    real.call_later(1, real.stop)
    real.run()
    flood.kill()
    flood.wait()
    assert len(turns) > 1
    assert len(set(turns)) == len(turns)


def test_a_signal_is_not_lost_behind_a_flood_of_others(real: Reactor) -> None:
    taken: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        real.add_signal(number, partial(taken.append, number))
    for _ in range(MORE_THAN_A_PIPE_HOLDS):
        signal.raise_signal(signal.SIGUSR1)
    signal.raise_signal(signal.SIGUSR2)
    real.turn()
    assert sorted(taken) == [signal.SIGUSR1, signal.SIGUSR2]


def test_close_gives_the_signals_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    reactor = Reactor()
    reactor.add_signal(signal.SIGUSR1, lambda: None)
    reactor.add_signal(signal.SIGUSR1, lambda: None)
    reactor.close()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_late_call_from_a_thread_does_not_write_to_a_closed_descriptor() -> None:
    reactor = Reactor()
    reactor.close()
    reactor.call_from_thread(lambda: None)


@pytest.mark.parametrize("mode", ["adaptive", "interrupt"])
def test_an_idle_loop_sleeps_instead_of_turning(
    mode: Mode, pair: tuple[socket.socket, socket.socket]
) -> None:
    reactor = Reactor(mode)
    reactor.add_fd(pair[0].fileno(), lambda _: True, name="quiet")
    reactor.call_from_thread(lambda: None)
    reactor.call_later(0.3, reactor.stop)
    reactor.run()
    spinning = 500 if mode == "adaptive" else 0  # what fits in SPIN_NS, generously
    assert reactor.turns <= 10 + spinning
    reactor.close()

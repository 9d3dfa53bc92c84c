"""The reactor: one thread's loop over file descriptors, pollers, timers and what they made due.

A turn is: ready descriptors, pollers, timers, calls from other threads, then one kick per channel
and one flush per connection. Handlers only append; nothing is sent before the end of the turn.
The work of a turn is bounded: at most `EVENTS_PER_TURN` descriptors, and only what was due when
the turn began.

An exception that a handler lets through is a bug. It is logged with its traceback and the loop
goes on, for the sake of the other disks; a handler that fails `FAILURES_MAX` times in a row is
called no more, or it would fail for ever.

One that lacks memory is nobody's bug; but what it would have done may be lost, and a request with
it. Who cannot do without calls `lose`, from whatever thread; the loop does so for its handlers.
"""

from __future__ import annotations

import heapq
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final, Literal, Protocol, TypeAlias

from reactor.log import logger
from reactor.signals import Signals

Mode: TypeAlias = Literal["adaptive", "poll", "interrupt"]
MODES: Final[tuple[Mode, ...]] = ("adaptive", "poll", "interrupt")

EVENTS_PER_TURN: Final = 64
# How long `adaptive` looks again after an answer before it sleeps: a little longer than the 30 us
# that a wake-up was measured to cost (4 KiB reads at depth 1: 20.7k/s without, 49.7k at 20 us,
# 49.5k at 50, 48.0k at 100). A peer on the same core cannot answer meanwhile: all looks are misses.
SPIN_NS: Final = 50_000
SPIN_MISSES_MAX: Final = 8  # in a row; then it sleeps at once
SPIN_REST: Final = 64  # busy turns until it looks again
NEVER: Final = -1.0
FAILURES_MAX: Final = 10
SHORTAGE_SECONDS: Final = 0.1  # the pause after a failure for want of memory

READABLE: Final = select.EPOLLIN
WRITABLE: Final = select.EPOLLOUT
HANGUP: Final = select.EPOLLHUP | select.EPOLLERR

log = logger(__name__)

#: Waits at most so many seconds (`NEVER`: for ever) and returns (descriptor, events) pairs.
PollFunction: TypeAlias = Callable[[float], Sequence[tuple[int, int]]]


class Kickable(Protocol):
    """Starts, once per turn, what the turn has queued."""

    kick_due: bool

    def kick(self) -> None:
        """Start it."""


class Flushable(Protocol):
    """Sends, once per turn, what the turn has appended."""

    flush_due: bool

    def flush(self) -> bool:
        """Send it; returns whether there was something to send."""


class Poller:
    """A function that the loop calls."""

    __slots__ = ("before_sleep", "failures", "function", "name")

    def __init__(
        self,
        name: str,
        function: Callable[..., bool],
        before_sleep: Callable[[], bool] | None = None,
    ) -> None:
        self.name = name
        self.function = function
        self.before_sleep = before_sleep
        self.failures = 0  # in a row


class Timer:
    """A call in the future; `cancel` is legal at any time, also from inside the call."""

    __slots__ = ("deadline_ns", "function")

    def __init__(self, deadline_ns: int, function: Callable[[], object] | None) -> None:
        self.deadline_ns = deadline_ns
        self.function = function

    def cancel(self) -> None:
        """Make sure that the call does not happen."""
        self.function = None


class Reactor:
    """One event loop. Not thread-safe but for `call_from_thread` and `lose`.

    `on_loss` is called at once when something was lost for want of memory; without one, it is only
    logged.
    """

    def __init__(
        self,
        mode: Mode = "adaptive",
        *,
        clock: Callable[[], int] = time.monotonic_ns,
        poll: PollFunction | None = None,
        spin_ns: int = SPIN_NS,
        on_loss: Callable[[], object] = lambda: None,
    ) -> None:
        self.mode = mode
        self.lose = on_loss
        self.clock = clock
        self.busy_ns = 0
        self.idle_ns = 0
        self.turns = 0
        self._spin_ns = spin_ns
        self._epoll = select.epoll()
        self._poll: PollFunction = poll or self._epoll_wait
        self._handlers: dict[int, Poller] = {}
        self._removed: set[int] = set()  # descriptors removed in this turn
        self._signals: Signals | None = None
        self._pollers: tuple[Poller, ...] = ()
        self._timers: list[tuple[int, int, Timer]] = []
        self._timer_order = 0
        self._kicks: list[Kickable] = []
        self._flushes: list[Flushable] = []
        self._calls: deque[Callable[[], object]] = deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._epoll.register(self._wakeup, READABLE)
        self._handlers[self._wakeup] = Poller("wakeup", self._drain_wakeup)
        self._spin_until = 0
        self._misses = 0  # spins in a row in which nothing came
        self._rest = 0  # busy turns after which to try again
        self._now = clock()
        self._running = False

    # --- registration ---

    def add_fd(
        self, fd: int, handler: Callable[[int], bool], *, name: str, events: int = READABLE
    ) -> None:
        """Call `handler(events)` whenever `fd` is ready; it returns whether it did work."""
        self._epoll.register(fd, events)
        self._handlers[fd] = Poller(name, handler)

    def modify_fd(self, fd: int, events: int) -> None:
        """Wait for `events` on `fd` from now on (0: only hang-ups and errors)."""
        self._epoll.modify(fd, events)

    def remove_fd(self, fd: int) -> None:
        """Forget `fd`, before it is closed; an event already waiting for it is dropped."""
        del self._handlers[fd]
        # The number may be given to another file within this turn.
        self._removed.add(fd)
        self._epoll.unregister(fd)

    def add_poller(
        self,
        function: Callable[[], bool],
        *,
        name: str,
        before_sleep: Callable[[], bool] | None = None,
    ) -> Poller:
        """Call `function` every turn; it returns whether it did work.

        `before_sleep` arms the poller's wake-up and returns whether work came meanwhile, so that
        no wake-up is lost. A poller without it keeps the loop from sleeping.
        """
        poller = Poller(name, function, before_sleep)
        self._pollers = (*self._pollers, poller)
        return poller

    def remove_poller(self, poller: Poller) -> None:
        """Call `poller` no more; legal from inside it."""
        self._pollers = tuple(other for other in self._pollers if other is not poller)

    def call_later(self, seconds: float, function: Callable[[], object]) -> Timer:
        """Call `function` once, `seconds` from now."""
        timer = Timer(self.clock() + int(seconds * 1e9), function)
        self._timer_order += 1
        heapq.heappush(self._timers, (timer.deadline_ns, self._timer_order, timer))
        return timer

    def call_from_thread(self, function: Callable[[], object]) -> None:
        """Call `function` in the loop, soon; legal from any thread."""
        self._calls.append(function)
        if self._wakeup >= 0:
            os.eventfd_write(self._wakeup, 1)

    def add_signal(self, number: int, function: Callable[[], object]) -> None:
        """Call `function` in the loop after signal `number`; main thread only."""
        if self._signals is None:
            self._signals = Signals()
            self.add_fd(
                self._signals.fd, partial(self._take_signals, self._signals), name="signals"
            )
        self._signals.add(number, function)

    def _take_signals(self, signals: Signals, _events: int) -> bool:
        self._calls.extend(signals.take())
        return True

    def mark_kick(self, channel: Kickable) -> None:
        """Kick `channel` at the end of this turn."""
        if not channel.kick_due:
            self._kicks.append(channel)  # first: it may lack memory
            channel.kick_due = True

    def mark_flush(self, connection: Flushable) -> None:
        """Flush `connection` at the end of this turn."""
        if not connection.flush_due:
            self._flushes.append(connection)
            connection.flush_due = True

    # --- running ---

    def run(self) -> None:
        """Turn until `stop`."""
        self._running = True
        while self._running:
            self.turn()

    def stop(self) -> None:
        """End `run` after this turn."""
        self._running = False

    def close(self) -> None:
        """Release the loop's own descriptors and signals."""
        if self._signals is not None:
            self._signals.close()
        self._epoll.close()
        wakeup, self._wakeup = self._wakeup, -1
        os.close(wakeup)

    def turn(self) -> bool:
        """Do one turn; returns whether there was work."""
        spinning = self._now < self._spin_until
        ready = self._poll(0 if spinning else self._wait_seconds())
        before, self._now = self._now, self.clock()
        self.idle_ns += self._now - before
        busy = self._call_ready(ready) if ready else False
        for poller in self._pollers:
            busy |= self._call(poller)
            if poller.failures >= FAILURES_MAX:
                self.remove_poller(poller)
        if self._timers and self._timers[0][0] <= self._now:
            busy |= self._run_timers()
        if self._calls:
            busy = True
            self._run_calls()
        if self._kicks:
            busy = True
            self._run_kicks()
        sent = False
        if self._flushes:
            busy = True
            sent = self._run_flushes()
        self.turns += 1
        if busy:
            began, self._now = self._now, self.clock()
            self.busy_ns += self._now - began
            if self.mode == "adaptive":
                self._plan_spin(hit=spinning, sent=sent)
        return busy

    def _plan_spin(self, *, hit: bool, sent: bool) -> None:
        """After an answer look for a while for the next request, unless that was in vain lately.

        The peer may be slow, or wait for this very core: then looking costs and gains nothing.
        """
        if hit:
            self._misses = 0
        if not sent:
            self._spin_until = 0
            return
        if self._misses >= SPIN_MISSES_MAX:
            self._rest -= 1
            if self._rest:
                return
            self._misses = SPIN_MISSES_MAX - 1  # one more try
        self._spin_until = self._now + self._spin_ns

    def _call_ready(self, ready: Sequence[tuple[int, int]]) -> bool:
        busy = False
        removed, handlers = self._removed, self._handlers
        if removed:
            removed.clear()
        for fd, events in ready:
            poller = handlers.get(fd)
            # An earlier handler of this turn may have removed it, and even added another.
            if poller is None or fd in removed:
                continue
            try:
                if poller.function(events):
                    busy = True
                poller.failures = 0
            except Exception:  # noqa: BLE001 - reported there
                busy = True
                self._failed(poller)
                if poller.failures >= FAILURES_MAX and handlers.get(fd) is poller:
                    self.remove_fd(fd)
        return busy

    def _call(self, poller: Poller) -> bool:
        """Call `poller`; returns whether it did work."""
        try:
            busy = poller.function()
            poller.failures = 0
        except Exception:  # noqa: BLE001 - reported there
            self._failed(poller)
            return True
        return busy

    def _failed(self, poller: Poller) -> None:
        """Report the exception that `poller` let through."""
        if isinstance(sys.exception(), MemoryError):
            self._lack_memory(poller.name)
            return
        poller.failures += 1
        more = "called again" if poller.failures < FAILURES_MAX else "called no more"
        log.exception("a bug in %s, which is %s", poller.name, more)

    def _wait_seconds(self) -> float:
        if self.mode == "poll" or self._calls or self._kicks or self._flushes:
            return 0
        for poller in self._pollers:
            if poller.before_sleep is None or poller.before_sleep():
                return 0
        timers = self._timers
        while timers and timers[0][2].function is None:
            heapq.heappop(timers)
        if self._spin_until:  # it ended and nothing came
            self._spin_until = 0
            self._misses += 1
            if self._misses == SPIN_MISSES_MAX:
                self._rest = SPIN_REST
        if not timers:
            return NEVER
        return max(0, timers[0][0] - self._now) / 1e9

    def _epoll_wait(self, seconds: float) -> Sequence[tuple[int, int]]:
        return self._epoll.poll(seconds, EVENTS_PER_TURN)

    def _run_timers(self) -> bool:
        due, now = [], self._now
        while self._timers and self._timers[0][0] <= now:
            due.append(heapq.heappop(self._timers)[2])
        busy = False
        for timer in due:
            function, timer.function = timer.function, None
            if function is not None:
                busy = True
                self._guard(function)
        return busy

    def _run_calls(self) -> None:
        for _ in range(len(self._calls)):
            self._guard(self._calls.popleft())

    def _run_kicks(self) -> None:
        kicks, self._kicks = self._kicks, []
        for channel in kicks:
            channel.kick_due = False
            self._guard(channel.kick)

    def _run_flushes(self) -> bool:
        sent = False
        flushes, self._flushes = self._flushes, []
        for connection in flushes:
            connection.flush_due = False
            try:
                sent |= connection.flush()
            except MemoryError:
                self._lack_memory(type(connection).__qualname__)
            except Exception:
                log.exception("a bug in %s", type(connection).__qualname__)
        return sent

    def _guard(self, function: Callable[[], object]) -> None:
        """Call `function` once; its bug must not keep the others from their turn."""
        try:
            function()
        except MemoryError:
            self._lack_memory(getattr(function, "__qualname__", str(function)))
        except Exception:
            log.exception("a bug in %s", getattr(function, "__qualname__", function))

    def _lack_memory(self, name: str) -> None:
        """Report a failure that is nobody's bug; what stays ready must not fail in a busy loop."""
        self.lose()
        log.error("%s: out of memory", name)
        time.sleep(SHORTAGE_SECONDS)

    def _drain_wakeup(self, _events: int) -> bool:
        os.eventfd_read(self._wakeup)
        return True

"""Virtual time, one source of chance, and what happens next."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any, Final

NS: Final = 1_000_000_000


class Violation(Exception):
    """Something that must never happen did."""


class Event:
    """A call in the future."""

    __slots__ = ("arguments", "function")

    def __init__(self, function: Callable[..., object] | None, arguments: tuple[Any, ...]) -> None:
        self.function = function
        self.arguments = arguments

    def cancel(self) -> None:
        """Make sure that it does not happen."""
        self.function = None


class World:
    """Everything that happens, in the order of a virtual clock. Delays in seconds."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.random = Random(seed)
        self.now = 0  # ns
        self.trace: list[str] | None = [] if tracing else None
        self.violations: list[str] = []
        self._events: list[tuple[int, int, Event]] = []
        self._order = 0

    def clock(self) -> int:
        """Return the time in ns, as a reactor wants it."""
        return self.now

    # --- chance ---

    def chance(self, probability: float) -> bool:
        """Return True so often."""
        return self.random.random() < probability

    def between(self, low: float, high: float) -> float:
        """Return a number, small ones more often."""
        draw = self.random.random()
        return low + (high - low) * draw * draw

    # --- time ---

    def after(self, seconds: float, function: Callable[..., object], *arguments: Any) -> Event:
        """Call `function(*arguments)` in so many seconds."""
        event = Event(function, arguments)
        self._order += 1
        heapq.heappush(self._events, (self.now + int(seconds * NS), self._order, event))
        return event

    def soon(self, longest: float, function: Callable[..., object], *arguments: Any) -> Event:
        """Call `function(*arguments)` within so many seconds."""
        return self.after(self.between(0, longest), function, *arguments)

    def next_time(self) -> int | None:
        """Return when the next thing happens."""
        events = self._events
        while events and events[0][2].function is None:
            heapq.heappop(events)
        return events[0][0] if events else None

    def happen(self) -> None:
        """Let the next thing happen."""
        time, _, event = heapq.heappop(self._events)
        self.now = max(self.now, time)
        function, event.function = event.function, None
        if function is not None:
            function(*event.arguments)

    # --- what is told ---

    def note(self, text: str, *arguments: object) -> None:
        """Add a line to the trace."""
        if self.trace is not None:
            self.trace.append(f"{self.now / NS:10.4f} {text % arguments}")

    def violate(self, text: str) -> None:
        """Note that something happened that must not."""
        self.note("VIOLATION: %s", text)
        self.violations.append(text)

"""Calls that may block for long or for ever, each in a thread of its own, with a deadline."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from reactor import background
from reactor.errors import DeviceError
from reactor.log import logger
from reactor.loop import Reactor

Result = TypeVar("Result")

log = logger(__name__)


class BlockingCall(Generic[Result]):
    """One call in a thread; `done(result, error)` comes exactly once, in the reactor.

    A call whose deadline passes, or that is abandoned, goes on in its thread (nothing can stop a
    thread that the kernel holds); what it returns after all goes to `late`.
    """

    def __init__(
        self,
        reactor: Reactor,
        name: str,
        seconds: float,
        function: Callable[[], Result],
        done: Callable[[Result | None, Exception | None], None],
        late: Callable[[Result], None] | None = None,
    ) -> None:
        self._reactor = reactor
        self._name = name
        self._done: Callable[[Result | None, Exception | None], None] | None = done
        self._late = late
        self._timer = reactor.call_later(seconds, lambda: self._expire(seconds))
        try:
            background.start(lambda: self._run(function))
        except OSError as error:
            failure = error
            reactor.call_from_thread(lambda: self._finish(None, failure))

    def abandon(self) -> None:
        """Make sure that `done` does not come."""
        self._done = None
        self._timer.cancel()

    def _run(self, function: Callable[[], Result]) -> None:
        try:
            result, error = function(), None
        except Exception as raised:  # noqa: BLE001 - reported in the reactor, by `done`
            result, error = None, raised
        self._reactor.call_from_thread(lambda: self._finish(result, error))

    def _finish(self, result: Result | None, error: Exception | None) -> None:
        self._timer.cancel()
        done, self._done = self._done, None
        if done is not None:
            done(result, error)
        elif error is not None:
            log.debug("%s failed after its deadline: %s", self._name, error)
        elif self._late is not None:
            self._late(cast("Result", result))

    def _expire(self, seconds: float) -> None:
        done, self._done = self._done, None
        if done is not None:
            message = f"{self._name} did not finish within {seconds:g} s"
            done(None, DeviceError(errno.ETIMEDOUT, message))

"""The one thing that a disk waits for: an answer of its worker, a blocking call, or a pause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from reactor.control.blocking import BlockingCall
from reactor.control.workers import WorkerProcess
from reactor.loop import Reactor, Timer
from reactor.messages import Message


class Errand:
    """At most one thing at a time; `on_end` comes after each, when the next may be begun."""

    def __init__(self, reactor: Reactor, worker: WorkerProcess, on_end: Callable[[], None]) -> None:
        self._reactor = reactor
        self._worker = worker
        self._on_end = on_end
        self._command = 0  # the id of the command whose answer is awaited
        self._last_command = 0
        self._kind = ""
        self._expected = ""
        self._take: Callable[[Message], None] | None = None
        self._deadline: Timer | None = None
        self._call: BlockingCall[Any] | None = None
        self._call_needs_worker = False
        self._pause: Timer | None = None

    def busy(self) -> bool:
        """Whether something is awaited."""
        return bool(self._command) or self._call is not None or self._pause is not None

    def needs_worker(self) -> bool:
        """Whether only the worker can bring what is awaited."""
        return bool(self._command) or (self._call is not None and self._call_needs_worker)

    def awaits(self, answer: str) -> bool:
        """Whether the worker's `answer` is what is awaited."""
        return bool(self._command) and self._expected == answer

    def ask(
        self,
        kind: str,
        answer: str,
        within: float,
        take: Callable[[Message], None],
        late: Callable[[str], None],
        **fields: Any,
    ) -> None:
        """Send a command and await its answer for `within` seconds.

        `late` gets the reason when the answer does not come. Nothing is awaited when the worker
        cannot be reached now.
        """
        assert not self.busy()
        self._last_command += 1
        if not self._worker.send(kind, id=self._last_command, **fields):
            return
        self._command = self._last_command
        self._kind = kind
        self._expected = answer
        self._take = take

        def expire() -> None:
            self.end_command()
            late(f"worker core {self._worker.core} did not answer {kind}")
            self._on_end()

        self._deadline = self._reactor.call_later(within, expire)

    def answered(self, message: Message) -> str | None:
        """Take `message` if it is the answer that is awaited; returns the command that failed."""
        if not self._command or message["id"] != self._command:
            return None
        take, kind, expected = self._take, self._kind, self._expected
        self.end_command()
        if message["type"] == "failed":
            return kind
        if take is not None and message["type"] == expected:
            take(message)
        return None

    def end_command(self) -> None:
        """Await the answer no longer."""
        self._command = 0
        self._take = None
        if self._deadline is not None:
            self._deadline.cancel()

    def call(
        self,
        name: str,
        within: float,
        function: Callable[[], Any],
        done: Callable[[Any, Exception | None], None],
        *,
        late: Callable[[Any], None] | None = None,
        needs_worker: bool = False,
    ) -> None:
        """Make a blocking call in a thread; see `BlockingCall`."""
        assert not self.busy()

        def finished(result: Any, error: Exception | None) -> None:
            self._call = None
            done(result, error)
            self._on_end()

        self._call_needs_worker = needs_worker
        self._call = BlockingCall(self._reactor, name, within, function, finished, late)

    def pause(self, seconds: float, then: Callable[[], None] | None = None) -> None:
        """Wait before the next thing, which is `then` if it is given."""

        def go_on() -> None:
            self._pause = None
            if then is not None:
                then()
            self._on_end()

        self._pause = self._reactor.call_later(seconds, go_on)

    def worker_lost(self) -> None:
        """Await nothing that only the worker could give."""
        self.end_command()
        if self._call is not None and self._call_needs_worker:
            # It waits for I/O that only the next worker can answer, which waits for this call.
            self._call.abandon()
            self._call = None

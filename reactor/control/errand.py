"""The one thing that a disk waits for: answers of its workers, a blocking call, or a pause."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Final

from reactor.control.platform import Call, Platform
from reactor.control.workers import WorkerProcess
from reactor.loop import Timer
from reactor.messages import Message

REPEAT_SECONDS: Final = 2.0  # until a command is said again: it, or its answer, may have got lost


class Errand:
    """At most one thing at a time; `on_end` comes after each, when the next may be begun."""

    def __init__(self, platform: Platform, on_end: Callable[[], None]) -> None:
        self._platform = platform
        self._reactor = platform.reactor
        self._on_end = on_end
        self._awaited: dict[WorkerProcess, None] = {}  # whose answer to the command is awaited
        self._command = 0  # its id
        self._said_ns = 0  # when it was last said
        self._kind = ""
        self._expected = ""
        self._take: Callable[[WorkerProcess, Message], None] | None = None
        self._late: Callable[[WorkerProcess, str], None] | None = None
        self._deadline: Timer | None = None
        self._repeat: Timer | None = None
        self._call: Call | None = None
        self._call_needs_worker = False
        self._pause: Timer | None = None

    def busy(self) -> bool:
        """Whether something is awaited."""
        return bool(self._awaited) or self._call is not None or self._pause is not None

    def needs(self, worker: WorkerProcess) -> bool:
        """Whether what is awaited may come from `worker` alone."""
        return worker in self._awaited or (self._call is not None and self._call_needs_worker)

    def awaits(self, answer: str) -> bool:
        """Whether an `answer` is what is awaited."""
        return bool(self._awaited) and self._expected == answer

    def ask(
        self,
        workers: Iterable[WorkerProcess],
        kind: str,
        answer: str,
        within: float,
        take: Callable[[WorkerProcess, Message], None],
        late: Callable[[WorkerProcess, str], None],
        **fields: Any,
    ) -> None:
        """Send a command and await the answer of each worker for `within` seconds.

        `late` gets the reason for each answer that does not come. From workers that cannot be
        reached now none is awaited.
        """
        assert not self.busy()
        # Of the clock: no other disk of its name, nor an earlier controller, ever said it.
        self._command = max(self._command + 1, self._reactor.clock() // 1_000_000)
        fields["id"] = self._command
        self._awaited = {worker: None for worker in workers if worker.send(kind, **fields)}
        if not self._awaited:
            return
        self._kind = kind
        self._expected = answer
        self._take = take
        self._late = late
        self._deadline = self._reactor.call_later(within, self._expire)
        self._repeat_later(fields)

    def hurry(self, within: float) -> None:
        """Await the answers for no more than so many seconds from now."""
        deadline = self._deadline
        if deadline is not None and deadline.deadline_ns > self._reactor.clock() + within * 1e9:
            deadline.cancel()
            self._deadline = self._reactor.call_later(within, self._expire)

    def _expire(self) -> None:
        for worker in list(self._awaited):
            self.pass_by(worker)
        self._on_end()

    def pass_by(self, worker: WorkerProcess) -> None:
        """Have the answer of `worker`, if it is awaited, be late now."""
        if worker in self._awaited:
            late, kind = self._late, self._kind
            self.excuse(worker)
            if late is not None:
                late(worker, f"worker core {worker.core} did not answer {kind}")

    def forget_before(self, time_ns: int, worker: WorkerProcess) -> bool:
        """Await nothing that `worker` was told before; returns whether it was told something since.

        That it has yet to answer.
        """
        told = worker in self._awaited and self._said_ns >= time_ns
        if not told:
            self.worker_lost(worker)
        return told

    def _repeat_later(self, fields: dict[str, Any]) -> None:
        self._said_ns = self._reactor.clock()
        self._repeat = self._reactor.call_later(REPEAT_SECONDS, partial(self._say_again, fields))

    def _say_again(self, fields: dict[str, Any]) -> None:
        for worker in self._awaited:
            worker.send(self._kind, **fields)
        self._repeat_later(fields)

    def answered(self, worker: WorkerProcess, message: Message) -> str | None:
        """Take `message` if it is the answer that is awaited; returns the command that failed."""
        if worker not in self._awaited or message["id"] != self._command:
            return None
        take, kind, expected = self._take, self._kind, self._expected
        self.excuse(worker)
        if message["type"] == "failed":
            return kind
        if take is not None and message["type"] == expected:
            take(worker, message)
        return None

    def excuse(self, worker: WorkerProcess) -> None:
        """Await the answer of `worker` no longer."""
        self._awaited.pop(worker, None)
        if not self._awaited and self._deadline is not None and self._repeat is not None:
            self._deadline.cancel()
            self._repeat.cancel()
            self._deadline = self._repeat = None

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
        """Make a blocking call in a thread; see `Platform.call`."""
        assert not self.busy()

        def finished(result: Any, error: Exception | None) -> None:
            self._call = None
            done(result, error)
            self._on_end()

        self._call_needs_worker = needs_worker
        self._call = self._platform.call(name, within, function, finished, late)

    def pause(self, seconds: float, then: Callable[[], None] | None = None) -> None:
        """Wait before the next thing, which is `then` if it is given."""

        def go_on() -> None:
            self._pause = None
            if then is not None:
                then()
            self._on_end()

        self._pause = self._reactor.call_later(seconds, go_on)

    def worker_lost(self, worker: WorkerProcess) -> None:
        """Await nothing that only `worker` could give."""
        self.excuse(worker)
        self.connections_lost()

    def connections_lost(self) -> None:
        """Await no I/O that only a new connection could bring, as that waits for this errand."""
        if self._call is not None and self._call_needs_worker:
            self._call.abandon()
            self._call = None

"""The engine for systems without io_uring, and for calls that io_uring does not know."""

from __future__ import annotations

import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Final

from backends.buffers import AlignedBuffer
from backends.engine import ENTRIES, Engine, OnRoom, Tag
from backends.linux import fallocate
from reactor.errors import error_number
from reactor.loop import Reactor

THREADS: Final = 4

Job = tuple[Callable[..., int | None], tuple[Any, ...], int]


class Threads(Engine):
    """Blocking calls in a few threads, which start with the first operation."""

    depth = ENTRIES - 1

    def __init__(
        self, reactor: Reactor, fd: int, on_room: OnRoom, *, threads: int = THREADS
    ) -> None:
        self.kick_due = False
        self._reactor = reactor
        self._fd = fd
        self._on_room = on_room
        self._threads_max = threads
        self._threads: list[threading.Thread] = []
        self._queued: list[Job] = []
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._results: deque[tuple[int, int]] = deque()  # an operation's number and result
        self.tags = {}

    def read(self, buffer: AlignedBuffer, start: int, length: int, offset: int, tag: Tag) -> None:
        self.call(os.preadv, (self._fd, (buffer.view[start : start + length],), offset), tag)

    def write(
        self, buffer: AlignedBuffer, start: int, length: int, offset: int, flags: int, tag: Tag
    ) -> None:
        data = (buffer.view[start : start + length],)
        self.call(os.pwritev, (self._fd, data, offset, flags), tag)

    def datasync(self, tag: Tag) -> None:
        self.call(os.fdatasync, (self._fd,), tag)

    def allocate(self, mode: int, offset: int, length: int, tag: Tag) -> None:
        self.call(fallocate, (self._fd, mode, offset, length), tag)

    def will_need(self, offset: int, length: int, tag: Tag) -> None:
        self.call(os.posix_fadvise, (self._fd, offset, length, os.POSIX_FADV_WILLNEED), tag)

    def call(
        self, function: Callable[..., int | None], arguments: tuple[Any, ...], tag: Tag
    ) -> None:
        """Call `function(*arguments)` in a thread; None as its result counts as 0."""
        try:
            self.in_flight += 1
            self.number += 1
            self.tags[self.number] = tag
            self._queued.append((function, arguments, self.number))
            self._reactor.mark_kick(self)
        except MemoryError:
            self._reactor.lose()  # it may be queued or not: it might be answered twice, or never
            raise

    def kick(self) -> None:
        """Hand what the turn queued to the threads."""
        if not self._queued:
            return
        self.rounds += 1
        if not self._threads:
            self._start_threads()
        for job in self._queued:
            if self._threads:
                self._jobs.put(job)
            else:
                self._finished(job[2], -errno.ENOMEM)
        self._queued.clear()

    def close(self) -> None:
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _start_threads(self) -> None:
        for number in range(self._threads_max):
            # A daemon: a call that hangs in a dead device must not keep the worker from exiting.
            thread = threading.Thread(target=self._work, name=f"file-io-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # no memory, or too many: those that there are do it all
                return
            self._threads.append(thread)

    def _work(self) -> None:
        try:
            while (job := self._jobs.get()) is not None:
                function, arguments, number = job
                try:
                    result = function(*arguments) or 0
                except (OSError, MemoryError) as error:
                    result = -error_number(error)
                self._finished(number, result)
        except MemoryError:
            self._reactor.lose()  # the request would never end

    def _finished(self, number: int, result: int) -> None:
        self._results.append((number, result))
        self._reactor.call_from_thread(self._reap)

    def _reap(self) -> None:
        # One wake-up may bring several results; those of the others then find nothing to do.
        try:
            for _ in range(len(self._results)):
                number, result = self._results.popleft()
                tag = self.tags.pop(number)
                self.in_flight -= 1
                tag[0](result, tag)
        finally:  # what was called may fail; then the next wake-up brings the others
            self._on_room()

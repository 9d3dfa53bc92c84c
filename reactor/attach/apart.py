"""Calls that wait for a device, made by a process of their own: see `reactor.attach.deviceio`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from reactor import background
from reactor.attach.deviceio import ANSWER, READY, REQUEST, What

START_SECONDS: Final = 10.0
LOOK_SECONDS: Final = 10.0  # of waiting, until the process is asked whether it hangs itself
ALIVE_SECONDS: Final = 5.0  # in which it says that it does not
END_SECONDS: Final = 1.0  # for the process to be gone; it may wait for a device


class Asked:
    """A call under way; `then` gets its errno, 0 for none, when it is answered."""

    def __init__(self, request: bytes, then: Callable[[int], None] | None) -> None:
        self.request = request
        self.process: _Process | None = None  # which makes the call
        self.was_lost = False  # once already, with a process that was killed
        self._then = then
        self._failure = 0
        self._done = threading.Event()

    def answer(self, failure: int) -> None:
        """Wake those who wait."""
        self._failure = failure
        self._done.set()
        if self._then is not None:
            self._then(failure)

    def wait(self, seconds: float | None = None) -> None:
        """Wait for its end; raises the OSError that it ended with, TimeoutError if it did not."""
        while not self._done.wait(LOOK_SECONDS if seconds is None else seconds):
            if seconds is not None:
                if self.process is not None:
                    self.process.suspect()
                raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
            if self.process is not None:
                self.process.kill_hung()
        if self._failure:
            raise OSError(self._failure, os.strerror(self._failure))


class DeviceIO:
    """The process, over all its lives: it is there from the first device on.

    No call needs a descriptor of this process. What a process that is killed had been asked, the
    next one is asked again, once.
    """

    def __init__(self) -> None:
        self.lock_memory = False
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._asked: dict[int, Asked] = {}
        self._numbers = itertools.count(READY + 1)

    def start(self) -> None:
        """Have the process there before memory is short; raises OSError."""
        with self._lock:
            self._started()

    def await_start(self) -> None:
        """Wait until the process does what it is asked for; raises OSError if it does not."""
        with self._lock:
            process = self._started()
        process.await_ready()

    def ask(
        self, what: What, index: int, value: int = 0, then: Callable[[int], None] | None = None
    ) -> Asked:
        """Begin a call; raises OSError when it cannot be begun. Does not wait for the device."""
        number = next(self._numbers)
        asked = Asked(REQUEST.pack(number, what, index, value), then)
        self._send(number, asked)
        return asked

    def close(self) -> None:
        """End the process. Calls under way are not answered any more."""
        with self._lock:
            process, self._process = self._process, None
            self._asked.clear()
        if process is not None:
            process.end()

    def _started(self) -> _Process:
        if self._process is None:
            options = ["--lock-memory"] if self.lock_memory else []
            self._process = _Process(options, self._on_answer, self._on_end)
        return self._process

    def _send(self, number: int, asked: Asked) -> None:
        with self._lock:
            asked.process = process = self._started()
            self._asked[number] = asked
            try:
                process.send(asked.request)
            except OSError:
                del self._asked[number]
                raise

    def _on_answer(self, number: int, failure: int) -> None:
        with self._lock:
            asked = self._asked.pop(number, None)
        if asked is not None:
            asked.answer(failure)

    def _on_end(self, process: _Process) -> None:
        with self._lock:
            if self._process is process:
                self._process = None
            process.close()
            lost = {n: asked for n, asked in self._asked.items() if asked.process is process}
            for number in lost:
                del self._asked[number]
        for number, asked in lost.items():
            self._ask_again(number, asked)

    def _ask_again(self, number: int, asked: Asked) -> None:
        if asked.was_lost:
            asked.answer(errno.ENOMEM)  # what kills one process after the other
            return
        asked.was_lost = True
        try:
            self._send(number, asked)
        except OSError as error:
            asked.answer(error.errno or errno.EIO)


class _Process:
    """One life of it. Raises OSError when it cannot be started."""

    def __init__(
        self,
        options: list[str],
        on_answer: Callable[[int, int], None],
        on_end: Callable[[_Process], None],
    ) -> None:
        self._ready = threading.Event()
        self._heard = threading.Event()  # something, since it was asked whether it lives
        self._ready_until = time.monotonic() + START_SECONDS
        self._on_answer = on_answer
        self._on_end = on_end
        self._gone = threading.Event()
        self._suspected = False
        self._socket, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-P", "-m", "reactor.attach.deviceio", *options]
        with contextlib.ExitStack() as undo, its_end:
            undo.callback(self._socket.close)
            # Its own session: the terminal's signals are the controller's to act on.
            self._child = subprocess.Popen(command, stdin=its_end.fileno(), start_new_session=True)
            undo.callback(self._child.wait)
            undo.callback(self._child.kill)
            background.start(self._read)
            undo.pop_all()

    def send(self, request: bytes) -> None:
        """Send a request; raises OSError ENOBUFS when too many are unread."""
        try:
            self._socket.send(request, socket.MSG_DONTWAIT)
        except BlockingIOError as error:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS)) from error
        except ConnectionError:
            pass  # `_read` sees its end, too

    def await_ready(self) -> None:
        """Wait until it has started, but once only; raises TimeoutError when it has not."""
        if not self._ready.wait(max(0.0, self._ready_until - time.monotonic())):
            raise TimeoutError(errno.ETIMEDOUT, "the process for device I/O does not start")

    def suspect(self) -> None:
        """Have it killed if it hangs itself, but wait for nothing."""
        if self._suspected:
            return
        self._suspected = True
        try:
            background.start(self._clear_up)
        except OSError:  # the next who waits in vain tries again
            self._suspected = False

    def _clear_up(self) -> None:
        try:
            self.kill_hung()
        finally:
            self._suspected = False

    def kill_hung(self) -> None:
        """Kill it if it says nothing when it is asked."""
        self._heard.clear()
        with contextlib.suppress(OSError):  # it may have read nothing for long
            self.send(REQUEST.pack(READY, What.SAY_READY, 0, 0))
        if not self._heard.wait(ALIVE_SECONDS):
            self._child.kill()

    def close(self) -> None:
        """Have it end when it hears of that."""
        self._socket.close()

    def end(self) -> None:
        """End it now."""
        self._child.kill()
        self._gone.wait(END_SECONDS)

    def _read(self) -> None:
        with contextlib.suppress(OSError, MemoryError):
            while answer := self._socket.recv(ANSWER.size):
                self._ready.set()
                self._heard.set()
                self._on_answer(*ANSWER.unpack(answer))
        self._ready.set()
        self._on_end(self)
        self._child.wait()
        self._gone.set()


#: That of this process.
DEVICE_IO: Final = DeviceIO()

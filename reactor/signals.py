"""Signals that wake a loop, and are handled inside it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any, Final

PIPE_BYTES: Final = 1 << 16  # what a pipe holds; what comes when it is full need not wake again


class Signals:
    """The signals of one loop, which is to `take` them when `fd` is readable. Main thread only.

    A handler written in Python is interrupted by the next signal: a flood of them has it
    call itself until the stack ends, and the process with it. So this one is C, and only notes it.
    """

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._functions: dict[int, Callable[[], object]] = {}
        self._came: dict[int, Any] = {}
        self._replaced: dict[int, Any] = {}  # the handlers before
        self._replaced_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def add(self, number: int, function: Callable[[], object]) -> None:
        """Have `function` taken after signal `number`."""
        self._functions[number] = function
        replaced = signal.signal(number, self._came.setdefault)
        self._replaced.setdefault(number, replaced)

    def take(self) -> list[Callable[[], object]]:
        """Return the functions of what has come; alike signals are one, as the kernel has it."""
        os.read(self.fd, PIPE_BYTES)
        signal.pthread_sigmask(signal.SIG_BLOCK, ())  # the handlers of what was read run in here
        numbers = [*self._came]
        for number in numbers:
            del self._came[number]
        return [self._functions[number] for number in numbers]

    def close(self) -> None:
        """Have the handlers from before again."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._replaced_fd)
        os.close(self.fd)
        os.close(self._write_fd)

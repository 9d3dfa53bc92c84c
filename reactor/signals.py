"""Signals as numbers in a pipe."""

from __future__ import annotations

import operator
import os
import signal
from collections.abc import Callable
from typing import Any, Final

NUMBERS_MAX: Final = 4096  # read at once; alike ones that wait are one signal, as the kernel has it


class Signals:
    """The signals of one loop, which is to `take` them when `fd` is readable. Main thread only.

    A handler written in Python is interrupted by the next signal: a flood of them has it
    call itself until the stack ends, and the process with it. So this one is C and does nothing.
    """

    def __init__(self) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._functions: dict[int, Callable[[], object]] = {}
        self._replaced: dict[int, Any] = {}  # the handlers before
        self._replaced_fd = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)

    def add(self, number: int, function: Callable[[], object]) -> None:
        """Have `function` taken after signal `number`."""
        self._functions[number] = function
        replaced = signal.signal(number, operator.is_)
        self._replaced.setdefault(number, replaced)

    def take(self) -> list[Callable[[], object]]:
        """Return the functions of what has come, each once, in the order of the first."""
        numbers = dict.fromkeys(os.read(self.fd, NUMBERS_MAX))
        return [self._functions[number] for number in numbers if number in self._functions]

    def close(self) -> None:
        """Have the handlers from before again."""
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._replaced_fd)
        os.close(self.fd)
        os.close(self._write_fd)

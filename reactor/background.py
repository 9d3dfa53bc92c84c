"""Calls that may hang, beside a loop that must not."""

from __future__ import annotations

import _thread
import errno
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

BEGIN_SECONDS: Final = 1.0
END_SECONDS: Final = 1.0
END_PAUSE_SECONDS: Final = 0.001


def start(function: Callable[[], object]) -> None:
    """Call `function` in a thread for which nobody waits, not even the end of the process.

    Raises OSError ENOMEM, and `function` is not called then. Not `threading.Thread`: its `start`
    waits for the thread to say that it runs, which one without memory never does.
    """
    claim, begun = threading.Lock(), threading.Event()

    def run() -> None:
        if claim.acquire(blocking=False):
            begun.set()
            with suppress(MemoryError):  # which Python would print the way of
                function()

    try:
        _thread.start_new_thread(run, ())
    except RuntimeError as error:
        raise _no_memory() from error
    if not begun.wait(BEGIN_SECONDS) and claim.acquire(blocking=False):
        raise _no_memory()


def prove(count: int) -> None:
    """Have so many threads at once, and end them; raises OSError.

    For a library that ends the process when it cannot have its own.
    """
    over = threading.Event()
    before = _threads()
    try:
        for _ in range(count):
            start(over.wait)
    finally:
        over.set()
    deadline = time.monotonic() + END_SECONDS
    while _threads() > before and time.monotonic() < deadline:
        time.sleep(END_PAUSE_SECONDS)


def _threads() -> int:
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def _no_memory() -> OSError:
    return OSError(errno.ENOMEM, "there is no memory for a thread")

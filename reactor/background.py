"""Calls that may hang, beside a loop that must not."""

from __future__ import annotations

import _thread
import errno
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

BEGIN_SECONDS: Final = 1.0


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


def _no_memory() -> OSError:
    return OSError(errno.ENOMEM, "there is no memory for a thread")

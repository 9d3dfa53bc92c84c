"""Calls that wait for a device, without what their process holds."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from typing import Final

from reactor import background

CLONE_FILES: Final = 0x400  # include/uapi/linux/sched.h
FD_MAX: Final = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)


def apart(function: Callable[[], object]) -> None:
    """Call `function` in a thread with a descriptor table of its own; raises what it raises.

    A thread that waits for a device outlives even the SIGKILL of its process. In the table that all
    threads share it would keep their locks: no other controller could begin, and none could have
    the device answer.
    """
    done = threading.Event()
    errors: list[Exception] = []

    def call() -> None:
        try:
            if _libc.unshare(CLONE_FILES) < 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
            os.closerange(3, FD_MAX)
            function()
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)
        finally:
            done.set()

    background.start(call)
    done.wait()
    if errors:
        raise errors[0]

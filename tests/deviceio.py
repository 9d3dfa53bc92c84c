"""The process that makes the calls which wait for a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

TITLE = "nbd-reactor: device I/O"


def device_io(controller: int | None = None) -> psutil.Process | None:
    """Return that of a process, of this one unless it is given; None: it has none, or none yet."""
    for child in psutil.Process(controller or os.getpid()).children():
        if child.status() != psutil.STATUS_ZOMBIE and " ".join(child.cmdline()).startswith(TITLE):
            return child
    return None


@contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    """Let a process do nothing for a while; it may be killed meanwhile."""
    process.suspend()
    try:
        yield
    finally:
        with suppress(psutil.NoSuchProcess):
            process.resume()


def waits_for_device(pid: int) -> bool:
    """Whether a thread of a process is in the kernel, where nothing can end it."""
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return any(state.rpartition(")")[2].split()[0] == "D" for state in states)

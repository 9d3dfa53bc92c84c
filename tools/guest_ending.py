"""How a guest ends: at its deadline or by a signal, and with nothing left behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

TIMED_OUT = 124


class Ended(BaseException):
    """A signal ended the run; `status` is what to exit with."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def catch_signals(timeout: int) -> None:
    """End the run on Ctrl-C, SIGTERM, SIGHUP and when the time is over."""

    def end(number: int, _frame: object) -> NoReturn:
        for other in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
            signal.signal(other, signal.SIG_IGN)  # cleaning up must not be interrupted
        raise Ended(TIMED_OUT if number == signal.SIGALRM else 128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, end)
    signal.alarm(timeout)


@contextlib.contextmanager
def temporary_directory(prefix: str) -> Iterator[Path]:
    """Make the directory for this run, and remove it."""
    bed = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        yield bed
    finally:
        shutil.rmtree(bed, ignore_errors=True)


def bury(group: int, bed: Path) -> int:
    """Fork a process that cleans up should this one be killed; a byte to the result dismisses it.

    User-Mode Linux leaves processes behind when its main process is killed, so the kernel's
    parent-death signal is not enough.
    """
    read_end, write_end = os.pipe()
    if os.fork():
        os.close(read_end)
        return write_end
    os.setsid()  # a Ctrl-C at the terminal is not for this process
    os.closerange(0, read_end)
    os.closerange(read_end + 1, 256)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    if not os.read(read_end, 1):
        kill_group(group)
        shutil.rmtree(bed, ignore_errors=True)
    os._exit(0)


def kill_group(group: int) -> None:
    """Kill every process of the guest."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)

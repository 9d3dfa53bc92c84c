"""Logging set-up: one line an event, as text or JSON, on standard error.

A thread writes it: whoever reads the log, or stores it, may stand still (a terminal after Ctrl-S, a
file that was swapped out to a disk of ours), and must not keep the service from going on.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, Literal, TypeAlias

from reactor import background

LogFormat: TypeAlias = Literal["text", "json"]
FORMATS: Final[tuple[LogFormat, ...]] = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error", "critical")
LINES_MAX: Final = 10_000  # that wait to be written; more are lost
ALIKE_MAX: Final = 200  # lines of one kind in a second; the others are counted
END_SECONDS: Final = 2.0  # for what waits when the process ends


def logger(module: str) -> logging.Logger:
    """Return the logger of a module."""
    return logging.getLogger(module)


class _Text(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process}: %(message)s")


class _Json(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Flood:
    """Keeps lines of one kind from flooding the log: thousands may connect, and be refused."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._lines: dict[str, int] = {}  # by the message without its arguments

    def admits(self, record: logging.LogRecord) -> bool:
        """Count a line; returns whether it is to be written."""
        count = self._lines[record.msg] = self._lines.get(record.msg, 0) + 1
        return count <= ALIKE_MAX

    def end_second(self) -> list[str]:
        """Say what was not written, if a second is over."""
        now = self._clock()
        if now - self._since < 1:
            return []
        self._since = now
        lines, self._lines = self._lines, {}
        return [
            f"not logged: {count - ALIKE_MAX} more lines like: {kind}"
            for kind, count in lines.items()
            if count > ALIKE_MAX
        ]


class _Writer(logging.Handler):
    """Hands each line to the thread that writes."""

    def __init__(self) -> None:
        super().__init__()
        self._flood = _Flood()
        self._lines: queue.Queue[str | None] = queue.Queue(LINES_MAX)
        self._ended = threading.Event()
        # Signals are for the main thread: there they may be blocked.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            background.start(self._write_all)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        atexit.register(self._end)

    def emit(self, record: logging.LogRecord) -> None:
        for left_out in self._flood.end_second():
            report = logging.LogRecord(record.name, logging.WARNING, "", 0, left_out, (), None)
            self.write(self.format(report))
        if self._flood.admits(record):
            self.write(self.format(record))

    def write(self, line: str) -> None:
        """Write a line, or lose it when too many wait."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(line + "\n")

    def _write_all(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
                sys.stderr.write(line)
                sys.stderr.flush()
        self._ended.set()

    def _end(self) -> None:
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._ended.wait(END_SECONDS)


def set_up(process: str, log_format: LogFormat, level: str) -> None:
    """Send this process's log to standard error; `process` names it on every line.

    Raises OSError.
    """
    root = logging.getLogger()
    writer = _writer() or _Writer()
    writer.setFormatter(_Json(process) if log_format == "json" else _Text(process))
    root.handlers[:] = [writer]
    root.setLevel(level.upper())


def tell(line: str) -> None:
    """Tell the operator on standard error, whatever the log level is."""
    writer = _writer()
    if writer is not None:
        writer.write(line)


def _writer() -> _Writer | None:
    return next((h for h in logging.getLogger().handlers if isinstance(h, _Writer)), None)

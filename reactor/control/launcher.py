"""Starts worker processes; where memory is locked, one is kept ready to take a dead one's place.

A Python process needs 20 MiB of memory before it can serve anything. A host that swaps to a device
of ours may not have them, and cannot get them, while the device's worker is dead.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

from reactor.messages import start_line
from reactor.options import Options

Process = subprocess.Popen[bytes]


class Launcher:
    """Processes for the workers of all cores."""

    def __init__(self, options: Options, instance: str) -> None:
        self._keeps_spare = options.lock_memory
        arguments = [
            *("--runtime-dir", os.fspath(options.runtime_dir)),
            *("--instance", instance),
            *("--mode", options.mode),
            *("--log-format", options.log_format),
            *("--log-level", options.log_level),
            *(["--lock-memory"] if options.lock_memory else []),
        ]
        self.start_line = start_line(arguments)
        self._command = [sys.executable, "-P", "-m", "reactor.data", *arguments]
        self._spare: Process | None = None

    def launch(self, core: int) -> Process:
        """Return a process that becomes the worker of `core`; raises OSError."""
        spare, self._spare = self._spare, None
        if spare is None or spare.poll() is not None:
            spare = self._start()
        assert spare.stdin is not None
        with contextlib.suppress(BrokenPipeError), spare.stdin:  # its end will be noticed as such
            spare.stdin.write(f"{core} {os.getpid()}\n".encode())
        return spare

    def keep_spare(self) -> None:
        """Have a process ready, if that is wanted; raises OSError."""
        if self._keeps_spare and (self._spare is None or self._spare.poll() is not None):
            self._spare = self._start()

    def close(self) -> None:
        """End the spare process."""
        spare, self._spare = self._spare, None
        if spare is not None:
            assert spare.stdin is not None
            spare.kill()
            spare.wait()
            spare.stdin.close()

    def _start(self) -> Process:
        # Its own session: the terminal's signals are the controller's to act on.
        return subprocess.Popen(self._command, stdin=subprocess.PIPE, start_new_session=True)

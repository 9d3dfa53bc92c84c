"""A worker's process, watched by a descriptor of it: it need not be a child."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from reactor.loop import Reactor


class WatchedProcess:
    """See `platform.Process`."""

    def __init__(
        self, reactor: Reactor, pid: int, pidfd: int, child: subprocess.Popen[bytes] | None = None
    ) -> None:
        self.pid = pid
        self._reactor = reactor
        self._pidfd = pidfd
        self._child = child
        self._on_exit: Callable[[int | None], None] | None = None

    def watch(self, on_exit: Callable[[int | None], None]) -> None:
        self._on_exit = on_exit
        self._reactor.add_fd(self._pidfd, self._on_ready, name=f"worker {self.pid}")

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def waits_for_medium(self) -> bool:
        status = self._status()
        return bool(status) and status[0] == "D"  # uninterruptible

    def progress(self) -> int | None:
        # Page faults, as CPU time is counted in hundredths of seconds, and the time.
        status = self._status()
        return sum(int(status[field - 3]) for field in (10, 12, 14, 15)) if status else None

    def _status(self) -> list[str]:
        """Return what proc(5) says of it from field 3 on; nothing if that cannot be read."""
        try:
            status = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return []
        return status.rpartition(")")[2].split()

    def _on_ready(self, _events: int) -> bool:
        assert self._on_exit is not None
        self._reactor.remove_fd(self._pidfd)
        os.close(self._pidfd)
        self._on_exit(self._child.wait() if self._child is not None else None)
        return True

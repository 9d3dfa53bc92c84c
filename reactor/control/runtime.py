"""The runtime directory: one service at a time, its name on this host, what a dead one left."""

from __future__ import annotations

import fcntl
import os
import secrets
import select
import signal
from pathlib import Path
from typing import Final

from reactor.errors import ReactorError, reason
from reactor.log import logger

#: The longest file in it that is a socket, `worker-NNN.sock`, must fit in struct sockaddr_un.
PATH_MAX: Final = 107 - len("/worker-1023.sock")
LEFTOVER_SECONDS: Final = 10.0

log = logger(__name__)


class RuntimeDir:
    """The directory, locked for this process. Raises ReactorError when another service has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if len(os.fsencode(path)) > PATH_MAX:
            raise ReactorError(
                f"runtime directory {path}: longer than {PATH_MAX} bytes, too long for the"
                " sockets in it; choose another with --runtime-dir"
            )
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._check_owner()
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._lock = os.open(path / "lock", flags, 0o600)
        except OSError as error:
            raise ReactorError(f"runtime directory {reason(error)}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip()
            os.close(self._lock)
            raise ReactorError(
                f"another nbd-reactor (pid {holder or 'unknown'}) runs on {path};"
                " stop it or choose another --runtime-dir"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0)
        self.instance = self._read_instance()

    def end_leftover_workers(self) -> None:
        """Kill the workers of a controller that died, and wait until they are gone.

        Their devices stay with the kernel, which holds the I/O until new workers serve them.
        """
        for path in sorted(self.path.glob("worker-*.lock")):
            with path.open("rb") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    self._end_worker(lock.read(32))

    def close(self) -> None:
        """Remove what this service made here, but for the lock file, and give up the lock."""
        for name in ("bus.sock", *(path.name for path in self.path.glob("worker-*"))):
            (self.path / name).unlink(missing_ok=True)
        os.close(self._lock)

    def _check_owner(self) -> None:
        # Whoever else may write here could have us kill any process, or overwrite any file.
        status = self.path.stat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise ReactorError(
                f"runtime directory {self.path}: other users own it or may write to it;"
                " remove it or choose another with --runtime-dir"
            )

    def _read_instance(self) -> str:
        path = self.path / "instance"
        try:
            instance = path.read_text().strip()
        except FileNotFoundError:
            instance = secrets.token_hex(4)
            path.write_text(instance + "\n")
        if not instance.isalnum():
            raise ReactorError(f"{path} is damaged; remove it if no service runs on it")
        return instance

    def _end_worker(self, text: bytes) -> None:
        try:
            pid = int(text)
            pidfd = os.pidfd_open(pid)
        except (ValueError, ProcessLookupError):
            return
        log.warning("a controller died here: its worker (pid %d) is replaced", pid)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            poll = select.poll()
            poll.register(pidfd, select.POLLIN)
            if not poll.poll(LEFTOVER_SECONDS * 1000):
                raise ReactorError(f"worker {pid} of a dead controller cannot be ended")
        finally:
            os.close(pidfd)

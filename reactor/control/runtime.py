"""The runtime directory: one service at a time, its name on this host, what a dead one left."""

from __future__ import annotations

import fcntl
import os
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from reactor.control.saved import SavedState, decode
from reactor.control.statefile import replace_file
from reactor.errors import ReactorError, reason

#: The longest file in it that is a socket, `worker-NNN.sock`, must fit in struct sockaddr_un.
PATH_MAX: Final = 107 - len("/worker-1023.sock")
STATE: Final = "state.json"
LINE_MAX: Final = 8192  # bytes of a lock file


@dataclass(frozen=True, slots=True)
class LeftWorker:
    """A living worker, and a descriptor of its process."""

    core: int
    pid: int
    pidfd: int
    start_line: str


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

    def surviving_workers(self) -> list[LeftWorker]:
        """Find the living workers of a controller that died."""
        found = (_left_worker(path) for path in sorted(self.path.glob("worker-*.lock")))
        return [worker for worker in found if worker is not None]

    def load(self) -> SavedState | None:
        """Return what was running; None when nothing was. Raises ReactorError, and keeps it."""
        path = self.path / STATE
        try:
            return decode(path.read_bytes(), self.instance)
        except FileNotFoundError:
            return None
        except (OSError, ReactorError, ValueError, LookupError, TypeError) as error:
            raise ReactorError(
                f"saved state {path}: {reason(error)}; nothing is touched. Move it away to start"
                " with the disks of the config alone: devices that only it knows are then released"
            ) from error

    def save(self, state: bytes) -> None:
        """Make `state` what is loaded next; raises OSError."""
        replace_file(self.path / STATE, state)

    def forget(self) -> None:
        """Have nothing running when the next service starts."""
        (self.path / STATE).unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the lock; what the service made here goes, but what its workers still need."""
        left = self.surviving_workers()
        for worker in left:
            os.close(worker.pidfd)
        if not left:
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


def _left_worker(path: Path) -> LeftWorker | None:
    """Return who holds the lock of a core, if anyone does."""
    with path.open("rb") as lock:
        pid, _, start_line = lock.read(LINE_MAX).decode(errors="replace").partition("\n")
        core = path.stem.removeprefix("worker-")
        try:
            pidfd = os.pidfd_open(int(pid))
        except (ValueError, ProcessLookupError):
            return None
        # Only now is it certain that the pid is not another process's by this time.
        if _is_locked(lock.fileno()) and core.isdigit():
            return LeftWorker(int(core), int(pid), pidfd, start_line.strip())
        os.close(pidfd)
        return None


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False

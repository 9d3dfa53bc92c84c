"""The runtime directory: one service at a time, its name on this host, what a dead one left."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from reactor.control.saved import SavedState, decode
from reactor.control.statefile import replace_file
from reactor.errors import ReactorError, reason
from reactor.log import logger

#: The longest file in it that is a socket, `worker-NNN.sock`, must fit in struct sockaddr_un.
PATH_MAX: Final = 107 - len("/worker-1023.sock")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
STATE: Final = "state.json"
OUTDATED: Final = "state-outdated.json"  # what it is called while the state cannot be saved
LINE_MAX: Final = 8192  # bytes of a lock file
STATE_MAX: Final = 256 << 20  # bytes
OWNER_SECONDS: Final = 1.0  # until a worker that has its lock must have said so
OWNER_PAUSE_SECONDS: Final = 0.02

#: What decoding raises when a file is not what was written.
DAMAGE: Final = (ValueError, LookupError, TypeError, AttributeError, RecursionError)

log = logger(__name__)


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
            self.boot = BOOT_ID.read_text().strip()
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
        try:
            os.ftruncate(self._lock, os.pwrite(self._lock, f"{os.getpid()}\n".encode(), 0))
        except OSError as error:
            os.close(self._lock)
            raise ReactorError(f"{path / 'lock'}: {reason(error)}") from error
        self.instance = self._read_instance()

    def surviving_workers(self) -> list[LeftWorker]:
        """Find the living workers of a controller that died."""
        found = (_left_worker(path) for path in sorted(self.path.glob("worker-*.lock")))
        return [worker for worker in found if worker is not None]

    def load(self) -> SavedState | None:
        """Return what was running; None when nothing was. Raises ReactorError, and keeps it."""
        for name in (STATE, OUTDATED):
            saved = self._load(self.path / name)
            if saved is not None:
                return saved if name == STATE else saved.outdated()
        return None

    def _load(self, path: Path) -> SavedState | None:
        try:
            with _opened(path) as file:
                size = os.fstat(file.fileno()).st_size
                return decode(file.read(min(size, STATE_MAX)), self.instance, self.boot)
        except FileNotFoundError:
            return None
        except (OSError, ReactorError, *DAMAGE) as error:
            raise ReactorError(
                f"saved state {_about(path, error)}; nothing is touched. Move it away to start"
                " with the disks of the config alone: devices that only it knows are then released"
            ) from error

    def save(self, state: bytes) -> None:
        """Make `state` what is loaded next; raises OSError."""
        replace_file(self.path / STATE, state)
        (self.path / OUTDATED).unlink(missing_ok=True)

    def outdate(self) -> None:
        """Have the next service know that what it loads is not all."""
        with suppress(OSError):
            (self.path / STATE).rename(self.path / OUTDATED)

    def forget(self) -> None:
        """Have nothing running when the next service starts."""
        for name in (STATE, OUTDATED):
            (self.path / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the lock; what the service made here goes, but what its workers still need."""
        left = self.surviving_workers()
        for worker in left:
            os.close(worker.pidfd)
        if not left:
            for name in ("bus.sock", *(path.name for path in self.path.glob("worker-*"))):
                try:
                    (self.path / name).unlink(missing_ok=True)
                except OSError as error:
                    log.warning("%s; remove it by hand", reason(error))
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
            with _opened(path) as file:
                instance = file.read(LINE_MAX).decode(errors="replace").strip()
        except FileNotFoundError:
            instance = secrets.token_hex(4)
            replace_file(path, f"{instance}\n".encode())
        if not (instance.isascii() and instance.isalnum()):
            raise ReactorError(f"{path} is damaged; remove it if no service runs on it")
        return instance


def _about(path: Path, error: Exception) -> str:
    """Return which file it is and what is wrong with it; an OSError names the file itself."""
    why = reason(error)
    return why if why.startswith(f"{path}: ") else f"{path}: {why}"


def _left_worker(path: Path) -> LeftWorker | None:
    """Return who holds the lock of a core, if anyone does."""
    core = path.stem.removeprefix("worker-")
    if not (core.isascii() and core.isdigit()):
        return None
    deadline = time.monotonic() + OWNER_SECONDS
    try:
        with _opened(path) as lock:
            while _is_locked(lock.fileno()):
                lock.seek(0)
                pid, _, start_line = lock.read(LINE_MAX).decode(errors="replace").partition("\n")
                # A worker that has just taken the lock shows the pid of who had it before.
                if pid in _owners(lock.fileno()):
                    return LeftWorker(
                        int(core), int(pid), os.pidfd_open(int(pid)), start_line.strip()
                    )
                if time.monotonic() > deadline:
                    log.warning("%s is locked by a process that does not say who it is", path)
                    return None
                time.sleep(OWNER_PAUSE_SECONDS)
    except OSError as error:
        log.warning("a lock file is left alone: %s", _about(path, error))
    return None


def _owners(fd: int) -> set[str]:
    """Return the pids of those who hold a flock on the file (proc(5), /proc/locks)."""
    inode = f":{os.fstat(fd).st_ino}"
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return {line[4] for line in lines if line[1] == "FLOCK" and line[5].endswith(inode)}


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file; raises OSError for anything else, and never waits."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    with open(fd, "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor)
        yield file


def _is_locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False

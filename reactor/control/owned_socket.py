"""A listening unix socket that belongs to one service at a time, and to its owner only."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from pathlib import Path

from reactor.errors import ReactorError, reason
from reactor.log import logger
from reactor.spec import UNIX_PATH_MAX

log = logger(__name__)


class OwnedSocket:
    """Listens on `path`, mode 0600, with a lock beside it. Raises ReactorError when it cannot."""

    def __init__(self, path: Path, backlog: int) -> None:
        self._path = path
        self._lock_path = path.with_name(path.name + ".lock")
        if len(os.fsencode(path)) > UNIX_PATH_MAX:
            raise ReactorError(f"{path}: longer than {UNIX_PATH_MAX} bytes, too long for a socket")
        try:
            self._lock = _lock(self._lock_path, path)
        except OSError as error:
            raise ReactorError(f"RPC socket {reason(error)}") from error
        try:
            self.sock = _listen(path, backlog)
            self._inode = path.stat().st_ino
        except OSError as error:
            self._unlock()
            raise ReactorError(f"RPC socket {path}: {reason(error)}") from error

    def close(self) -> None:
        """Stop listening; the path is removed if it is still this socket."""
        try:
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()
        except OSError as error:
            log.debug("RPC socket %s: %s", self._path, reason(error))
        self.sock.close()
        self._unlock()

    def _unlock(self) -> None:
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)


def _lock(lock_path: Path, path: Path) -> int:
    """Return the descriptor that holds the lock; it must be taken before a socket is replaced."""
    while True:
        fd = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_ino == lock_path.stat().st_ino:
                return fd
        except BlockingIOError:
            os.close(fd)
            raise ReactorError(f"RPC socket {path}: another service serves it") from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last holder removed the file meanwhile: this is nobody's lock


def _listen(path: Path, backlog: int) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _remove_stale(path)
        # The file that bind makes takes the mode of the socket: it is never open to others.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(os.fspath(path))
        sock.listen(backlog)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: Path) -> None:
    """Remove the socket of a service that died; raises OSError when it is anything else."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise OSError(errno.EEXIST, "it exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:  # its backlog is full
            pass
    raise OSError(errno.EADDRINUSE, "another program serves it")

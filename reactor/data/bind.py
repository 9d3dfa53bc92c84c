"""Makes listening sockets, and takes unix sockets' paths away again."""

from __future__ import annotations

import errno
import os
import socket
import stat
from typing import Final, TypeAlias

from reactor.spec import Address

# Clients that the kernel keeps waiting for accept, at most net.core.somaxconn; when it is full,
# connect says EAGAIN to a unix client that does not block.
BACKLOG: Final = 1024
_FAMILIES: Final = {socket.AF_UNIX, socket.AF_INET, socket.AF_INET6}

Identity: TypeAlias = tuple[int, int]  # a file's device and inode


class ListeningSocket:
    """A non-blocking listening socket; `close` also removes the unix path that it made."""

    def __init__(self, sock: socket.socket, path: str | None = None) -> None:
        self.sock = sock
        self._path = path
        self._identity = None if path is None else _identity(path)

    def close(self) -> None:
        """Stop listening."""
        # First the path, so that nobody finds it refusing; only ours, as another service may
        # have replaced it.
        if self._path is not None and _identity(self._path) == self._identity is not None:
            os.unlink(self._path)  # noqa: PTH108 (a str all the way to bind)
        self.sock.close()


def listen(address: Address) -> ListeningSocket:
    """Listen on a unix or TCP address; raises OSError that names it.

    A unix socket gets the permissions that the process's umask leaves: by the usual 022 only its
    owner may connect. One that nobody listens on any more is replaced.
    """
    try:
        if "\0" in address.target:  # the kernel would take the path to end there
            raise OSError(errno.EINVAL, "it contains a NUL character")
        if address.kind == "unix":
            return _listen_unix(address.target)
        return _listen_tcp(address)
    except OSError as error:
        text = f"cannot listen on {address}: {error.strerror}"
        raise OSError(error.errno, text) from error


def adopt(sock: socket.socket, address: Address) -> ListeningSocket:
    """Use a listening socket that another process made; raises OSError when it is none."""
    try:
        if sock.family not in _FAMILIES or sock.type != socket.SOCK_STREAM or not _accepts(sock):
            text = f"{address} is not a listening stream socket (unix or TCP)"
            raise OSError(errno.EINVAL, text)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return ListeningSocket(sock)


def _accepts(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _listen_unix(path: str) -> ListeningSocket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno == errno.ENOENT:
                parent = os.path.dirname(path)  # noqa: PTH120
                raise OSError(errno.ENOENT, f"there is no directory {parent}") from error
            if error.errno != errno.EADDRINUSE:
                raise
            _remove_stale(path)
            sock.bind(path)
        sock.listen(BACKLOG)
        return ListeningSocket(sock, path)
    except OSError:
        sock.close()
        raise


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens on; raises OSError EADDRINUSE when it is in use."""
    found = _identity(path)
    if found is None:
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EADDRINUSE, "the path exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refused = probe.connect_ex(path) == errno.ECONNREFUSED
    if not refused:
        raise OSError(errno.EADDRINUSE, "another process uses this socket")
    if _identity(path) == found:
        os.unlink(path)  # noqa: PTH108


def _identity(path: str) -> Identity | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _listen_tcp(address: Address) -> ListeningSocket:
    # Only numbers: a worker must not wait for a name server.
    host = "127.0.0.1" if address.target == "localhost" else address.target
    try:
        ((family, *_, where), *_) = socket.getaddrinfo(
            host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST
        )
    except (OSError, UnicodeError) as error:
        text = f"{address.target} is neither an IP address nor localhost"
        raise OSError(errno.EINVAL, text) from error
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        # A restart need not wait for the connections of the last run to leave TIME_WAIT.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(where)
        sock.listen(BACKLOG)
    except OSError:
        sock.close()
        raise
    return ListeningSocket(sock)

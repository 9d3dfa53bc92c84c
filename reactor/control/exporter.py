"""Serves the metrics over HTTP, in the controller's loop: one request a connection."""

from __future__ import annotations

import errno
import re
import socket
from http import HTTPStatus
from typing import Final

from reactor.control.measures import measure
from reactor.control.service import Service
from reactor.errors import ReactorError, reason
from reactor.log import logger
from reactor.loop import HANGUP, READABLE, WRITABLE, Reactor
from reactor.metrics import CONTENT_TYPE, render

PATH: Final = "/metrics"
CLIENTS_MAX: Final = 32
BACKLOG: Final = 32
HEAD_MAX: Final = 8192  # bytes of a request
CLIENT_SECONDS: Final = 10.0  # from accept to close, whatever the client does
ACCEPT_RETRY_SECONDS: Final = 1.0

_HEAD_END: Final = re.compile(rb"\r?\n\r?\n")
_REQUEST_LINE: Final = re.compile(rb"([A-Z]+) ([!-~]+) HTTP/1\.[01]\r?\n")

log = logger(__name__)


class Exporter:
    """Listens on (host, port); port 0 takes a free one. Raises ReactorError when it cannot."""

    def __init__(self, reactor: Reactor, address: tuple[str, int], service: Service) -> None:
        self.reactor = reactor
        self._service = service
        self._clients: set[_Client] = set()
        self._sock = _listen(*address)
        self.address: tuple[str, int] = self._sock.getsockname()[:2]
        reactor.add_fd(self._sock.fileno(), self._accept, name="metrics")

    def close(self) -> None:
        """Stop listening and close every connection."""
        for client in list(self._clients):
            client.close()
        self.reactor.remove_fd(self._sock.fileno())
        self._sock.close()

    def page(self) -> bytes:
        """Return the metrics as they are now."""
        return render(measure(self._service)).encode()

    def forget(self, client: _Client) -> None:
        """Drop a connection that is closed."""
        if len(self._clients) == CLIENTS_MAX:
            self._listen_again()
        self._clients.discard(client)

    def _accept(self, _events: int) -> bool:
        try:
            sock, _ = self._sock.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                log.warning("metrics: cannot accept a connection: %s", reason(error))
                self.reactor.modify_fd(self._sock.fileno(), 0)
                self.reactor.call_later(ACCEPT_RETRY_SECONDS, self._listen_again)
            return True
        sock.setblocking(False)
        self._clients.add(_Client(self, sock))
        if len(self._clients) == CLIENTS_MAX:
            self.reactor.modify_fd(self._sock.fileno(), 0)  # the others wait in the backlog
        return True

    def _listen_again(self) -> None:
        if self._sock.fileno() >= 0:
            self.reactor.modify_fd(self._sock.fileno(), READABLE)


class _Client:
    """One connection: reads a request, sends the response, waits for the end."""

    def __init__(self, exporter: Exporter, sock: socket.socket) -> None:
        self._exporter = exporter
        self._reactor = exporter.reactor
        self._sock = sock
        self._head = bytearray()
        self._outgoing = memoryview(b"")
        self._answered = False
        self._deadline = self._reactor.call_later(CLIENT_SECONDS, self.close)
        self._reactor.add_fd(sock.fileno(), self._on_ready, name="metrics client")

    def close(self) -> None:
        """Close at once."""
        self._deadline.cancel()
        self._reactor.remove_fd(self._sock.fileno())
        self._sock.close()
        self._exporter.forget(self)

    def _on_ready(self, events: int) -> bool:
        try:
            if events & READABLE:
                self._receive()
            elif events & WRITABLE:
                self._send()
            elif events & HANGUP:
                self.close()
        except BlockingIOError:
            pass
        except OSError as error:
            log.debug("metrics client: %s", reason(error))
            self.close()
        return True

    def _receive(self) -> None:
        data = self._sock.recv(HEAD_MAX)
        if not data:
            self.close()
        elif not self._answered:
            self._head += data
            self._answer()

    def _answer(self) -> None:
        ended = _HEAD_END.search(self._head)
        if ended is None and len(self._head) < HEAD_MAX:
            return
        self._answered = True
        if ended is None:
            response = _plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        else:
            response = self._respond()
        self._outgoing = memoryview(response)
        self._reactor.modify_fd(self._sock.fileno(), WRITABLE)
        self._send()

    def _respond(self) -> bytes:
        line = _REQUEST_LINE.match(self._head)
        if line is None:
            return _plain(HTTPStatus.BAD_REQUEST)
        method, path = line[1].decode(), line[2].decode().partition("?")[0]
        if path != PATH:
            return _plain(HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _plain(HTTPStatus.METHOD_NOT_ALLOWED, "Allow: GET, HEAD\r\n")
        page = self._exporter.page()
        head = _head(HTTPStatus.OK, CONTENT_TYPE, len(page))
        return head if method == "HEAD" else head + page

    def _send(self) -> None:
        self._outgoing = self._outgoing[self._sock.send(self._outgoing) :]
        if not self._outgoing:
            # Closing while the client still sends would reset the connection under the response.
            self._sock.shutdown(socket.SHUT_WR)
            self._reactor.modify_fd(self._sock.fileno(), READABLE)


def _plain(status: HTTPStatus, more: str = "") -> bytes:
    text = f"{status.value} {status.phrase}\n".encode()
    return _head(status, "text/plain; charset=utf-8", len(text), more) + text


def _head(status: HTTPStatus, content_type: str, length: int, more: str = "") -> bytes:
    return (
        f"HTTP/1.0 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {length}\r\n{more}Connection: close\r\n\r\n"
    ).encode()


def _listen(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
    except (OSError, UnicodeError) as error:  # UnicodeError: a host that is no host name
        raise ReactorError(f"metrics address {host}:{port}: {reason(error)}") from error
    return sock

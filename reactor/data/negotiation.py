"""A client's socket from accept to the end of its handshake."""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

from reactor.errors import ProtocolError, reason
from reactor.log import logger
from reactor.loop import READABLE, WRITABLE, Reactor
from reactor.protocol.export import Export
from reactor.protocol.handshake import GREETING, Handshake

HANDSHAKE_SECONDS: Final = 10.0
RECEIVE_BYTES: Final = 16 << 10
_CREDENTIALS: Final = struct.Struct("=iII")  # pid, uid, gid

log = logger(__name__)


class Negotiation:
    """Speaks the handshake with one client, then calls `on_over` once, out of the reactor.

    With an `export` the socket is still open and `trailing` are its first requests; without one
    it is closed, and the log says why.
    """

    def __init__(
        self,
        reactor: Reactor,
        sock: socket.socket,
        name: str,
        exports: Mapping[str, Export],
        on_over: Callable[[Negotiation], None],
    ) -> None:
        self.sock = sock
        self.name = name
        self._reactor = reactor
        self._on_over = on_over
        self._handshake = Handshake(exports)
        self._unsent = bytearray(GREETING)
        self._waits_for = READABLE
        reactor.add_fd(sock.fileno(), self._on_ready, name=f"handshake of {name}")
        self._deadline = reactor.call_later(HANDSHAKE_SECONDS, self._expire)

    @property
    def export(self) -> Export | None:
        """What the client chose."""
        return self._handshake.export

    @property
    def trailing(self) -> bytes:
        """What came after the handshake."""
        return self._handshake.trailing

    def begin(self) -> None:
        """Greet the client."""
        self._advance(self._send)

    def close(self) -> None:
        """Drop the client."""
        self._leave_reactor()
        self.sock.close()

    def _on_ready(self, _events: int) -> bool:
        self._advance(self._send if self._unsent else self._receive)
        return True

    def _advance(self, step: Callable[[], None]) -> None:
        try:
            step()
        except ProtocolError as error:
            self._drop(f"is dropped: {error}")
        except (OSError, MemoryError) as error:
            if self._handshake.finished:  # after ABORT a client need not wait for its ACK
                self._let_go()
            elif isinstance(error, BrokenPipeError):
                self._drop("disconnected in the handshake")
            else:
                self._drop(f"was lost in the handshake: {reason(error)}")

    def _receive(self) -> None:
        try:
            data = self.sock.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self._drop("disconnected in the handshake")
            return
        self._unsent += self._handshake.receive(data)
        self._send()

    def _send(self) -> None:
        with suppress(BlockingIOError):
            del self._unsent[: self.sock.send(self._unsent)]
        # A client that does not read its replies is not read from: they stay bounded.
        waits_for = WRITABLE if self._unsent else READABLE
        if waits_for != self._waits_for:
            self._waits_for = waits_for
            self._reactor.modify_fd(self.sock.fileno(), waits_for)
        if self._unsent:
            return
        if self._handshake.finished:
            self._let_go()
        elif self._handshake.export is not None:
            self._leave_reactor()
            self._on_over(self)

    def _expire(self) -> None:
        self._drop(f"did not finish the handshake in {HANDSHAKE_SECONDS:.0f} s")

    def _let_go(self) -> None:
        log.debug("%s left without an export", self.name)
        self.close()
        self._on_over(self)

    def _drop(self, why: str) -> None:
        log.info("%s %s", self.name, why)
        self.close()
        self._on_over(self)

    def _leave_reactor(self) -> None:
        self._deadline.cancel()
        self._reactor.remove_fd(self.sock.fileno())


def peer_name(sock: socket.socket, address: Any) -> str:
    """Name the client at the other end of an accepted socket; `address` is what accept said."""
    if sock.family == socket.AF_UNIX:
        packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        pid, uid, _gid = _CREDENTIALS.unpack(packed)
        return f"pid {pid} of user {uid}"
    host, port = address[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

"""Accepts clients on an address and hands each over when it has chosen an export."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from reactor.data.bind import adopt, listen
from reactor.data.negotiation import Negotiation, peer_name
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import READABLE, Reactor, Timer
from reactor.protocol.export import Export
from reactor.spec import Address

NEGOTIATIONS_MAX: Final = 128  # clients in their handshake; one more takes the oldest's place
ACCEPTS_PER_TURN: Final = 16
ACCEPT_RETRY_SECONDS: Final = 1.0
#: A client whose host vanished is found out in two minutes, and does not count for ever.
KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 10),  # seconds
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6),
)

log = logger(__name__)


class Listener:
    """Serves `exports`, which may change at any time, on one address.

    `on_client(sock, export, trailing)` gets each client that begins its transmission phase: a
    non-blocking socket, no longer in the reactor, and the requests that came already.
    Raises OSError that names the address. `sock` is one handed over; it belongs to the listener.
    """

    def __init__(
        self,
        reactor: Reactor,
        address: Address,
        on_client: Callable[[socket.socket, Export, bytes], None],
        *,
        sock: socket.socket | None = None,
    ) -> None:
        self.address = address
        self.exports: dict[str, Export] = {}
        self._reactor = reactor
        self._on_client = on_client
        self._negotiations: dict[Negotiation, None] = {}  # the oldest first
        self._retry: Timer | None = None
        self._paused = False
        self._listening = listen(address) if sock is None else adopt(sock, address)
        self._fd = self._listening.sock.fileno()
        reactor.add_fd(self._fd, self._on_ready, name=f"listener {address}")

    def close(self) -> None:
        """Stop listening and drop the clients that are still in their handshake."""
        if self._retry is not None:
            self._retry.cancel()
        self._reactor.remove_fd(self._fd)
        self._listening.close()
        for negotiation in self._negotiations:
            negotiation.close()
        self._negotiations.clear()

    def _on_ready(self, _events: int) -> bool:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                sock, peer = self._listening.sock.accept()
            except BlockingIOError:
                break
            except ConnectionError:  # it left before it was accepted
                continue
            except (OSError, MemoryError) as error:  # out of descriptors, or memory: it can wait
                log.warning("cannot accept a client on %s: %s", self.address, reason(error))
                self._pause()
                self._retry = self._reactor.call_later(ACCEPT_RETRY_SECONDS, self._resume)
                break
            try:
                self._negotiate(sock, peer)
            except (OSError, MemoryError) as error:
                log.warning("cannot greet a client on %s: %s", self.address, reason(error))
                sock.close()
        return True

    def _negotiate(self, sock: socket.socket, peer: Any) -> None:
        name = f"{self.address}: client {peer_name(sock, peer)}"
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for level, option, value in KEEPALIVE:
                sock.setsockopt(level, option, value)
        if len(self._negotiations) >= NEGOTIATIONS_MAX:
            # Whoever connects and says nothing must not shut the others out.
            oldest = next(iter(self._negotiations))
            del self._negotiations[oldest]
            log.info("%s made room for another: it was not done with its handshake", oldest.name)
            oldest.close()
        negotiation = Negotiation(self._reactor, sock, name, self.exports, self._on_over)
        self._negotiations[negotiation] = None
        negotiation.begin()

    def _on_over(self, negotiation: Negotiation) -> None:
        self._negotiations.pop(negotiation, None)
        export = negotiation.export
        if export is None:
            return
        if not any(export is served for served in self.exports.values()):
            log.info("%s came too late: %s is gone", negotiation.name, export.name)
            negotiation.sock.close()
            return
        log.debug("%s opens %s", negotiation.name, export.name)
        try:
            self._on_client(negotiation.sock, export, negotiation.trailing)
        except (OSError, MemoryError) as error:
            log.warning("%s cannot be served: %s", negotiation.name, reason(error))
            negotiation.sock.close()

    def _pause(self) -> None:
        self._paused = True
        self._reactor.modify_fd(self._fd, 0)

    def _resume(self) -> None:
        if self._paused:
            self._paused = False
            self._reactor.modify_fd(self._fd, READABLE)

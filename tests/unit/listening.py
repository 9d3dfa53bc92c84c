"""A listener with its clients, over real sockets, in a reactor that the test turns itself."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import suppress

from reactor.data.listener import Listener
from reactor.loop import Reactor
from reactor.protocol.export import Export
from reactor.spec import Address
from tests.unit.test_handshake import FIXED_NO_ZEROES, disk, info, option

GO = FIXED_NO_ZEROES + option(7, info(b"disk"))
GREETING_BYTES = 18
GO_REPLY_BYTES = 20 + 12 + 20 + 14 + 20
SECONDS = 20.0  # until a test that waits fails


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


class World:
    """A reactor whose clock can be put forward, with its listener, clients and guests."""

    def __init__(self) -> None:
        self.skipped_ns = 0
        self.reactor = Reactor("poll", clock=lambda: time.monotonic_ns() + self.skipped_ns)
        self.handed: list[tuple[socket.socket, Export, bytes]] = []
        self.clients: list[socket.socket] = []
        self.listeners: list[Listener] = []

    def listen(self, address: Address, sock: socket.socket | None = None) -> Listener:
        listener = Listener(
            self.reactor, address, lambda *client: self.handed.append(client), sock=sock
        )
        listener.exports["disk"] = disk()
        self.listeners.append(listener)
        return listener

    def connect(self, address: Address) -> socket.socket:
        where: str | tuple[str, int]
        if address.kind == "unix":
            client, where = socket.socket(socket.AF_UNIX), address.target
        else:
            family = socket.AF_INET6 if ":" in address.target else socket.AF_INET
            client, where = socket.socket(family), (address.target, address.port)
        self.clients.append(client)
        client.connect(where)
        client.setblocking(False)
        return client

    def greet(self, address: Address) -> socket.socket:
        client = self.connect(address)
        self.read(client, GREETING_BYTES)
        return client

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            self.reactor.turn()

    def read(self, client: socket.socket, length: int) -> bytes:
        """Turn until the client has so many bytes; fewer when its stream ends before."""
        received, ended = b"", False

        def enough() -> bool:
            nonlocal received, ended
            with suppress(BlockingIOError):
                data = client.recv(length - len(received))
                ended = not data
                received += data
            return ended or len(received) == length

        self.until(enough)
        return received

    def ended(self, client: socket.socket) -> bool:
        """Turn until the client's stream ends; False when something comes instead."""
        try:
            return self.read(client, 1) == b""
        except ConnectionResetError:
            return True

    def skip(self, seconds: float) -> None:
        self.skipped_ns += int(seconds * 1e9)
        self.reactor.turn()

    def close(self) -> None:
        for listener in self.listeners:
            listener.close()
        for sock in (*self.clients, *(sock for sock, _, _ in self.handed)):
            sock.close()
        self.reactor.close()

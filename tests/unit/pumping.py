"""A connection on a real socket pair, its loop turned by hand, and channels to put below it."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Self

from backends.api import DONE, Buffer, Channel, Disk, Holder, Owner, Releasable, Request
from backends.null import NullDisk
from reactor.data.connection import Connection
from reactor.data.fence import FencedConnection, Lanes
from reactor.loop import Reactor
from reactor.protocol.export import Export
from reactor.protocol.wire import NBD_CMD_READ
from tests.unit.requests import export as make_export
from tests.unit.requests import replies

TURNS_MAX = 100_000


def pattern(offset: int, length: int) -> bytes:
    """Return what a `HeldChannel` has at `offset`."""
    return bytes((offset // 512 + i) & 0xFF for i in range(min(length, 512))) * (length // 512 or 1)


class HeldChannel(Channel):
    """Keeps requests pending until the test finishes them; has room for `room` at a time."""

    def __init__(self, disk: Disk, room: int = 1 << 30) -> None:
        super().__init__(disk)
        self.capacity = room
        self.pending: list[tuple[Request, Owner]] = []
        self.submitted: list[tuple[int, int, int, bytes | None]] = []  # cookie, offset, length, ...

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        if len(self.pending) >= self.capacity:
            raise self.refuse(owner)
        _command, _flags, cookie, offset, length, payload = request
        copy = None if payload is None else bytes(payload)
        self.submitted.append((cookie, offset, length, copy))
        self.pending.append((request, owner))
        return None

    def finish(
        self,
        index: int = 0,
        *,
        error: int = 0,
        data: bytes | None = None,
        lent: Releasable | None = None,
    ) -> Request:
        request, owner = self.pending.pop(index)
        if data is None:
            read = request[0] == NBD_CMD_READ and not error
            data = pattern(request[3], request[4]) if read else DONE
        owner.complete(request, error, data, lent)
        return request

    def finish_all(self) -> None:
        while self.pending:
            self.finish()
        self.room()


class CallChannel(Channel):
    """Answers with what a function returns or raises."""

    def __init__(self, disk: Disk, function: Callable[[Request], Buffer | None]) -> None:
        super().__init__(disk)
        self.function = function

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        return self.function(request)


class Lent:
    """A buffer on loan."""

    def __init__(self) -> None:
        self.released = 0

    def release(self) -> None:
        self.released += 1

    def blocked(self, holder: Holder) -> None:
        self.holder = holder


def null_disk(size: int = 1 << 20) -> Disk:
    return NullDisk("disk", size, 512, readonly=False)


class Pump:
    """A connection with its peer `client`; use as a context so that nothing is left open."""

    def __init__(
        self,
        channel: Channel | None = None,
        *,
        export: Export | None = None,
        disk: Disk | None = None,
        trailing: bytes = b"",
        send_buffer: int | None = None,
        resends: bool = False,
        lanes: Lanes | None = None,
    ) -> None:
        self.reactor = Reactor("poll")
        self.export = export or make_export(size=disk.size if disk else 1 << 20)
        self.disk = disk or null_disk(self.export.size)
        self.channel = channel or self.disk.channel(self.reactor)
        self.closed: list[str] = []
        self.client, served = socket.socketpair()
        self.client.setblocking(False)
        if send_buffer is not None:
            served.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.served = served
        common = (self.reactor, served, self.export, self.channel, self._on_closed)
        if lanes is None:
            self.connection = Connection(*common, trailing=trailing, resends=resends)
        else:
            self.connection = FencedConnection(lanes, *common)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.connection.close("the test is over")
        self.reactor.turn()
        self.reactor.close()

    def _on_closed(self, connection: Connection, reason: str) -> None:
        assert connection is self.connection
        assert self.served.fileno() == -1
        self.closed.append(reason)

    def turns(self, count: int = 4) -> None:
        """Let the loop turn: with less than `count` events due, all is done then."""
        for _ in range(count):
            self.reactor.turn()

    def until(self, condition: Callable[[], object]) -> None:
        for _ in range(TURNS_MAX):
            if condition():
                return
            self.reactor.turn()
        raise AssertionError("it did not happen")

    def send(self, data: bytes) -> None:
        """Send all of `data`, letting the connection receive meanwhile."""
        left = memoryview(data)
        for _ in range(TURNS_MAX):
            if not left:
                return
            try:
                left = left[self.client.send(left) :]
            except BlockingIOError:
                self.reactor.turn()
        raise AssertionError("the connection does not receive")

    def receive(self, count: int) -> bytes:
        """Return the next `count` bytes, which must come."""
        received = bytearray()
        for _ in range(TURNS_MAX):
            received += self.drain_client(count - len(received))
            if len(received) == count:
                return bytes(received)
            self.reactor.turn()
        raise AssertionError(f"{len(received)} bytes came instead of {count}")

    def drain_client(self, count: int = 1 << 30) -> bytes:
        """Return what is there for the client now."""
        received = bytearray()
        while len(received) < count:
            try:
                piece = self.client.recv(min(count - len(received), 1 << 20))
            except (BlockingIOError, ConnectionResetError):
                break
            if not piece:
                break
            received += piece
        return bytes(received)

    def ask(self, data: bytes, **reads: int) -> list[tuple[int, int, bytes]]:
        """Send requests and return all replies that come; `reads` as in `replies`."""
        self.send(data)
        self.turns()
        return replies(self.drain_client(), {int(key[1:]): length for key, length in reads.items()})

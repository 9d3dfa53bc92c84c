"""The memory of a worker that its clients may occupy together.

Each client always has `RESERVE` bytes, so that it can go on; what it occupies beyond them is
counted here. When all is occupied, large requests wait, and whoever occupies some and neither takes
its replies nor sends the rest of its request is closed after a while.
"""

from __future__ import annotations

from typing import Final, Protocol

from reactor.loop import Reactor, Timer

BYTES_MAX: Final = 256 << 20  # of all clients
CLIENT_BYTES_MAX: Final = 32 << 20  # that one may have in flight and waiting to be sent
RESERVE: Final = 1 << 20  # bytes that each client has beside them
LOOK_SECONDS: Final = 1.0
SLOW_SECONDS: Final = 10.0
SLOW_BYTES: Final = 1 << 20  # who moves less in that time keeps others waiting


class Client(Protocol):
    """Who occupies memory."""

    @property
    def moved(self) -> int:
        """The bytes that its peer has taken and sent since the beginning, about."""

    @property
    def waits_for_peer(self) -> bool:
        """Whether the peer must act before memory becomes free."""

    def rest(self) -> None:
        """Give memory back that is not needed now."""

    def resume(self) -> None:
        """Try again what had no room."""

    def close(self, why: str) -> None:
        """Give all up."""


class ClientMemory:
    """How much is left, who occupies the rest, and who waits for it."""

    def __init__(self, reactor: Reactor) -> None:
        self.left = BYTES_MAX  # less than 0 by what was not known before it was occupied
        self._reactor = reactor
        # Since when (ns) it is watched, and what it had moved then.
        self._clients: dict[Client, tuple[int, int]] = {}
        self._waiting: dict[Client, None] = {}  # in their order
        self._wake: Timer | None = None
        self._look: Timer | None = None

    def take(self, client: Client, count: int) -> bool:
        """Occupy `count` bytes more; False: not now, `client.resume` is called later."""
        if count > self.left:
            for other in list(self._clients):
                if other is not client:
                    other.rest()
        if count > self.left:
            self._waiting[client] = None
            if self._look is None:
                self._look = self._reactor.call_later(LOOK_SECONDS, self._close_slow)
            return False
        self.left -= count
        self._watch(client)
        return True

    def change(self, client: Client, before: int, now: int) -> None:
        """Note that `client` occupies `now` bytes, and no longer `before`."""
        self.left += before - now
        if now:
            self._watch(client)
        else:
            self._clients.pop(client, None)
        if now <= before and self._waiting and self._wake is None:
            self._wake = self._reactor.call_later(0, self._resume)

    def forget(self, client: Client, count: int) -> None:
        """Free the `count` bytes of a client that is gone."""
        self._waiting.pop(client, None)
        # Also of none: it may be gone since there was no memory for the timer that wakes others.
        self.change(client, count, 0)

    def _watch(self, client: Client) -> None:
        if client not in self._clients:
            self._clients[client] = self._reactor.clock(), client.moved

    def _resume(self) -> None:
        self._wake = None
        for client in list(self._waiting):  # it may come to wait again, or be forgotten
            if client in self._waiting:
                del self._waiting[client]
                client.resume()

    def _close_slow(self) -> None:
        self._look = None
        if not self._waiting:
            return
        self._look = self._reactor.call_later(LOOK_SECONDS, self._close_slow)
        now = self._reactor.clock()
        for client, (since, before) in list(self._clients.items()):
            if now - since < SLOW_SECONDS * 1e9:
                continue
            moved = client.moved
            if client.waits_for_peer and moved - before < SLOW_BYTES:
                client.close("its peer is slow, and others need the memory")
            else:
                self._clients[client] = now, moved


class Share:
    """What one client occupies beyond its reserve; no `memory` bounds it when that is None."""

    def __init__(self, memory: ClientMemory | None) -> None:
        self.bytes = 0
        self._memory = memory

    def most(self) -> int:
        """Return how many bytes the client may have in flight and waiting to be sent."""
        memory = self._memory
        if memory is None or memory.left >= CLIENT_BYTES_MAX:
            return CLIENT_BYTES_MAX
        return min(CLIENT_BYTES_MAX, RESERVE + self.bytes + max(0, memory.left))

    def take(self, client: Client, length: int) -> bool:
        """Occupy `length` bytes more; False: not now, `Client.resume` is called later."""
        if self._memory is not None:
            if not self._memory.take(client, length):
                return False
            self.bytes += length
        return True

    def count(self, client: Client, total: int) -> None:
        """Occupy what `total` bytes of the client take, no more and no less."""
        if self._memory is not None:
            before, self.bytes = self.bytes, max(0, total - RESERVE)
            if before != self.bytes:
                self._memory.change(client, before, self.bytes)

    def give_up(self, client: Client) -> None:
        """Occupy nothing: the client is gone."""
        if self._memory is not None:
            before, self.bytes = self.bytes, 0
            self._memory.forget(client, before)

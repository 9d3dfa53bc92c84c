"""What waits to be sent on a socket: buffers by reference, gathered into one call."""

from __future__ import annotations

import socket
from collections import deque
from typing import Final

from backends.api import Buffer, Releasable
from reactor.protocol.wire import SIMPLE_REPLY

REPLY_BYTES: Final = SIMPLE_REPLY.size
BUFFERS_PER_SEND: Final = 1024  # IOV_MAX; the kernel refuses more


class Outgoing:
    """A queue of non-empty buffers. Whoever appends to `buffers` adds their bytes to `waiting`."""

    __slots__ = ("__weakref__", "_blocked", "_lent", "buffers", "sent", "waiting")

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.waiting = 0  # bytes in `buffers`
        self.sent = 0  # bytes since the beginning; with `waiting` a place in the stream
        self._lent: deque[tuple[int, Releasable]] = deque()
        self._blocked = False  # the socket took less than the last send offered

    @property
    def own_bytes(self) -> int:
        """The bytes that wait in memory of their own, not in that of a disk."""
        parts = (
            (part, part.obj if isinstance(part, memoryview) else part) for part in self.buffers
        )
        return sum(len(part) for part, memory in parts if isinstance(memory, bytes))

    def lend(self, lent: Releasable) -> None:
        """Release `lent` once everything appended so far has left."""
        self._lent.append((self.sent + self.waiting, lent))
        if self._blocked:
            lent.blocked(self)

    def give_back(self) -> None:
        """Copy what waits for a blocked socket and release what was lent for it."""
        if not (self._blocked and self._lent):
            return
        # In place: this may be called while a batch is being appended. What is no view is ours.
        buffers = self.buffers
        buffers[:] = [bytes(part) if isinstance(part, memoryview) else part for part in buffers]
        while self._lent:
            self._lent.popleft()[1].release()

    def send(self, sock: socket.socket) -> bool:
        """Send once, as much as one call takes; False when the socket took less. Raises OSError."""
        buffers = self.buffers
        try:
            sent = sock.sendmsg(
                buffers if len(buffers) <= BUFFERS_PER_SEND else buffers[:BUFFERS_PER_SEND]
            )
        except BlockingIOError:
            self._note_blocked()
            return False
        self.sent += sent
        self.waiting -= sent
        self._blocked = False
        accepted = True
        if self.waiting:
            accepted = self._drop(sent)
        else:
            buffers.clear()
        while self._lent and self._lent[0][0] <= self.sent:
            self._lent.popleft()[1].release()
        if not accepted:
            self._note_blocked()
        return accepted

    def clear(self) -> None:
        """Drop everything and release what was lent."""
        self.buffers.clear()
        self.waiting = 0
        while self._lent:
            self._lent.popleft()[1].release()

    def _note_blocked(self) -> None:
        self._blocked = True
        if self._lent:
            self._lent[0][1].blocked(self)

    def _drop(self, sent: int) -> bool:
        """Drop `sent` bytes from the front; returns whether that is all that one call takes."""
        buffers = self.buffers
        whole = 0
        while sent >= len(buffers[whole]):
            sent -= len(buffers[whole])
            whole += 1
        del buffers[:whole]
        if sent:
            buffers[0] = memoryview(buffers[0])[sent:]
        return whole == BUFFERS_PER_SEND

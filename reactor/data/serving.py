"""A disk that a worker serves: its channel, its export, its connections."""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from backends import registry
from backends.api import Disk, Event
from backends.emulation import open_channel
from reactor.data.clientmemory import ClientMemory
from reactor.data.connection import Connection
from reactor.data.counters import COUNTERS
from reactor.data.fence import FencedConnection, Lanes
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.protocol.export import Export
from reactor.protocol.wire import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_ROTATIONAL,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
)
from reactor.spec import DiskSpec

REMOVE_SECONDS: Final = 10.0  # how long a hot remove waits for what is in flight
CONNECTIONS_MAX: Final = 256  # clients of one disk

log = logger(__name__)


def transmission_flags(disk: Disk) -> int:
    """Return the NBD_FLAG_* that say what `disk` can do."""
    flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_CACHE
    if disk.can_multi_conn:
        flags |= NBD_FLAG_CAN_MULTI_CONN
    if disk.is_rotational:
        flags |= NBD_FLAG_ROTATIONAL
    if disk.can_flush:
        flags |= NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA
    if disk.readonly:
        return flags | NBD_FLAG_READ_ONLY
    if disk.can_trim:
        flags |= NBD_FLAG_SEND_TRIM
    return flags | NBD_FLAG_SEND_WRITE_ZEROES


class ServedDisk:
    """One open disk with everyone who uses it. Raises OSError when it cannot be opened."""

    def __init__(
        self,
        reactor: Reactor,
        spec: DiskSpec,
        instance: str,
        *,
        shared: bool,
        least: int,  # bytes that its storage must have, 0: it may be made
        on_removed: Callable[[ServedDisk, str], None],
        on_disconnected: Callable[[ServedDisk, int, str], None],
        memory: ClientMemory | None = None,
    ) -> None:
        self.spec = spec
        self.shared = shared  # other workers may have it open too
        self.leads = False
        self.members: list[int] = []  # cores whose workers get clients from this one, if it leads
        self._reactor = reactor
        self._memory = memory
        self._on_removed = on_removed
        self._on_disconnected = on_disconnected
        self._generations: dict[Connection, int] = {}  # 0: a client, else the kernel's
        self._positions: dict[int, int] = {}  # of the kernel's connections, by generation
        self._leashes: dict[Connection, socket.socket] = {}  # of clients that another worker gave
        self._finished: Counter[str] = Counter()
        self._told = (-1, -1)  # system calls and connections when the counters were last told
        self._resting = False  # its connections gave their memory back
        self._removal: str | None = None
        self._removal_timer: Timer | None = None
        self._on_stopped: Callable[[], None] | None = None
        self._on_released: Callable[[], None] | None = None
        self.disk = registry.backend(spec.backend).create(
            spec.name,
            spec.options,
            instance=instance,
            reactor=reactor,
            block_size=spec.block_size,
            readonly=spec.readonly,
            shared=shared,
            least=least,
        )
        try:
            self._descriptor = self.disk.open(self._on_event, write=not self.disk.readonly)
            self._channel = open_channel(self.disk, reactor)
        except BaseException:
            self.disk.close()
            raise
        # A single connection is only replaced when nothing of it is in flight any more: its worker
        # tells of its end then, and who opens the disk after a dead one waits for its last I/O.
        fenced = spec.connections > 1 and not spec.readonly
        self._lanes = Lanes(self.disk.lock_fd, reactor, spec.name) if fenced else None
        self.export = Export(
            name=spec.name,
            description=f"{spec.backend} disk",
            size=self.disk.size,
            block_size=self.disk.block_size,
            flags=transmission_flags(self.disk),
            preferred_block_size=max(4096, self.disk.block_size),
        )

    @property
    def clients(self) -> int:
        """The clients that are served here."""
        return sum(not generation for generation in self._generations.values())

    def serve(
        self,
        sock: socket.socket,
        generation: int,
        trailing: bytes = b"",
        leash: socket.socket | None = None,
        position: int = 0,
    ) -> None:
        """Serve the transmission phase on `sock`, a client's (generation 0) or the kernel's.

        `leash` is closed when `sock` is. One byte on it takes the client from the worker that
        offers it; raises OSError when it has taken the client back.
        """
        if self._refuses(generation):
            sock.close()
            if leash is not None:
                leash.close()
            return
        if leash is not None:
            leash.send(b"\1")
        common = (self._reactor, sock, self.export, self._channel, self._closed)
        if generation and self._lanes is not None:
            connection: Connection = FencedConnection(self._lanes, *common)
        else:
            resends, memory = generation != 0, None if generation else self._memory
            connection = Connection(*common, trailing=trailing, resends=resends, memory=memory)
        if generation:
            self._positions[generation] = position
        self._generations[connection] = generation
        if leash is not None:
            self._leashes[connection] = leash
        if self._removal is not None:
            connection.refuse()

    def _refuses(self, generation: int) -> bool:
        if self._on_stopped is not None or (generation == 0 and self._removal is not None):
            return True
        clients = len(self._generations)
        if generation == 0 and clients >= CONNECTIONS_MAX:
            log.warning("disk %s has %d connections: one more is refused", self.spec.name, clients)
            return True
        return False

    def remove(self, reason: str) -> None:
        """Hot remove: refuse new I/O, let what is in flight end, then report the removal."""
        if self._removal is not None or self._on_stopped is not None:
            return
        log.warning("disk %s is removed: %s", self.spec.name, reason)
        self._removal = reason
        for connection in list(self._generations):
            connection.refuse()
        self._await_removal(self._reactor.clock() + int(REMOVE_SECONDS * 1e9))

    def stop(self, seconds: float, on_stopped: Callable[[], None]) -> None:
        """Drain every connection for at most `seconds`, then release everything."""
        self._on_stopped = on_stopped
        if self._removal_timer is not None:
            self._removal_timer.cancel()
        for connection in list(self._generations):
            connection.drain(seconds)
        self._close_if_unused()

    def release(self, seconds: float, on_released: Callable[[], None]) -> None:
        """Drain the kernel's connections for at most `seconds`, then close them."""
        self._on_released = on_released
        for connection, generation in list(self._generations.items()):
            if generation:
                connection.drain(seconds)
        self._report_released()

    @property
    def quiet(self) -> bool:
        """Whether it is neither being stopped nor being released."""
        return self._on_stopped is None and self._on_released is None

    def report(self) -> dict[str, Any]:
        """Return what the controller must know of it, whatever it knew before."""
        self._told = (-1, -1)  # all counters too
        return {
            "spec": self.spec.to_message(),
            "size": self.export.size,
            "block_size": self.export.block_size,
            "flags": self.export.flags,
            "shared": self.shared,
            "leads": self.leads,
            "members": self.members,
            "refusing": self._removal is not None,
            "reason": self._removal or "",
            "connections": [
                (generation, self._positions[generation])
                for generation in self._generations.values()
                if generation
            ],
        }

    def resize(self, size: int, *, follow: bool) -> None:
        """Change the size of the disk, or follow who does; raises OSError."""
        if size % self.disk.block_size:
            message = f"{size} bytes is not a multiple of the block size {self.disk.block_size}"
            raise OSError(errno.EINVAL, message)
        if follow:
            self.disk.follow(size)
        elif size != self.disk.size:
            self.disk.resize(size)
        self.export.size = self.disk.size
        self.spec = self.spec.with_size(self.disk.size)

    def statistics(self) -> dict[str, int]:
        """Return the counters since the disk was opened."""
        total = Counter(self._finished)
        for connection in self._generations:
            self._count(connection, total)
        counters = {name: total[name] for name in COUNTERS}
        counters["connections"] = len(self._generations)
        return counters

    def changed_statistics(self) -> dict[str, int] | None:
        """Return the counters, None when nothing has happened since the last call."""
        calls = self._finished["receives"] + self._finished["sends"]
        for connection in self._generations:
            calls += connection.counters.receives + connection.counters.sends
        before, self._told = self._told, (calls, len(self._generations))
        if self._told != before:
            self._resting = False
            return self.statistics()
        if not self._resting:
            self._resting = True
            for connection in self._generations:
                connection.rest()
            self._channel.rest()
        return None

    def _on_event(self, event: Event, reason: str) -> None:
        if event is Event.REMOVE:
            self.remove(reason)
        else:
            self.export.size = self.disk.size

    def _await_removal(self, deadline: int) -> None:
        idle = all(connection.idle for connection in self._generations)
        if not idle and self._reactor.clock() < deadline:
            self._removal_timer = self._reactor.call_later(
                0.01, lambda: self._await_removal(deadline)
            )
            return
        # Clients are told by their end of stream; the kernel's connection is the controller's to
        # end, and is answered with errors until then.
        for connection, generation in list(self._generations.items()):
            if generation == 0:
                connection.drain(REMOVE_SECONDS)
        self._on_removed(self, self._removal or "")

    def _closed(self, connection: Connection, reason: str) -> None:
        generation = self._generations.pop(connection)
        leash = self._leashes.pop(connection, None)
        if leash is not None:
            leash.close()
        self._count(connection, self._finished)
        if generation:
            del self._positions[generation]
            self._on_disconnected(self, generation, reason)
            self._report_released()
        self._close_if_unused()

    def _report_released(self) -> None:
        if self._on_released is not None and not any(self._generations.values()):
            on_released, self._on_released = self._on_released, None
            on_released()

    def _close_if_unused(self) -> None:
        if self._on_stopped is None or self._generations:
            return
        self._channel.close()
        if self._lanes is not None:
            self._lanes.close()
        self._descriptor.close()
        self.disk.close()
        on_stopped, self._on_stopped = self._on_stopped, lambda: None
        on_stopped()

    @staticmethod
    def _count(connection: Connection, total: Counter[str]) -> None:
        for name in COUNTERS:
            total[name] += getattr(connection.counters, name)

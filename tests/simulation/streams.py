"""Socket pairs between the kernel and workers: who holds an end, and what is on its way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from tests.simulation.world import World

if TYPE_CHECKING:
    from tests.simulation.kernel import KernelDevice
    from tests.simulation.storage import Storage

LATENCY: Final = 0.0005  # seconds, at most


class End:
    """An end of a stream in one process, as the controller's code sees a socket."""

    def __init__(self, side: Side, holders: dict[End, None]) -> None:
        self.side = side
        self._holders = holders  # the open ends of that process
        side.references += 1
        holders[self] = None

    def close(self) -> None:
        """Close it; again is legal."""
        if self in self._holders:
            del self._holders[self]
            self.side.drop()

    def dup(self, holders: dict[End, None]) -> End:
        """Return another reference to the same end, of another process."""
        return End(self.side, holders)


class Side:
    """One side of a stream: closed when nobody refers to it any more."""

    def __init__(self, world: World, stream: Stream) -> None:
        self.references = 0
        self.stream = stream
        self.peer: Side
        self.inbox: deque[Any] = deque()  # what came and was not read
        self.on_data: Callable[[], None] | None = None
        self.on_hangup: Callable[[], None] | None = None
        self._world = world

    @property
    def closed(self) -> bool:
        """Whether nobody has this end open."""
        return self.references == 0

    def drop(self) -> None:
        """Give up one reference."""
        self.references -= 1
        if self.references == 0:
            self.inbox.clear()
            self.on_data = self.on_hangup = None
            self._world.soon(LATENCY, self.peer.hung_up)

    def hung_up(self) -> None:
        """Tell who reads here that nothing will come any more."""
        if self.on_hangup is not None and not self.closed:
            self.on_hangup()

    def send(self, message: Any) -> bool:
        """Send to the peer; False when it is closed."""
        if self.peer.closed:
            return False
        self._world.soon(LATENCY, self.peer.arrive, message)
        return True

    def arrive(self, message: Any) -> None:
        """Take what the peer sent."""
        if self.closed:
            return
        self.inbox.append(message)
        if self.on_data is not None:
            self.on_data()


class Stream:
    """A pair of connected sockets. What is on its way may overtake: requests have no order."""

    def __init__(self, world: World) -> None:
        self.kernel = Side(world, self)
        self.worker = Side(world, self)
        self.kernel.peer, self.worker.peer = self.worker, self.kernel
        self.device: KernelDevice | None = None
        self.served: tuple[str, int] | None = None  # as what a worker got it
        self.storage: Storage | None = None
        self._world = world

    def serve(self, disk: str, generation: int, storage: Storage) -> None:
        """Note that a worker got its end."""
        key = (disk, generation)
        if self.served is not None:
            self._world.violate(f"{self.served} was delivered again, as {key}")
        self.served, self.storage = key, storage
        device = self.device
        sockets = [socket.side for socket in device.sockets] if device is not None else []
        if device is not None and self.kernel in sockets and device.disk != disk:
            self._world.violate(f"a socket of {device.path}, disk {device.disk}, is served {disk}")
        for socket in device.sockets if device is not None else ():
            stream = socket.side.stream
            if stream is not self and stream.served == key and not socket.dead:
                self._world.violate(f"generation {generation} of disk {disk} is on two sockets")

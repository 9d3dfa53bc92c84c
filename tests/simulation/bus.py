"""The control bus: in order each way, and cut when either side dies."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final, Protocol

from reactor.messages import COMMANDS, EVENTS, Message, decode, encode
from tests.simulation.world import World

LATENCY: Final = 0.01  # seconds, at most
CONNECT_SECONDS: Final = 0.5  # until a worker finds a new controller, at most


class Faults(Protocol):
    """What may happen to a message."""

    def copies(self, kind: str) -> int:
        """Return how often a message arrives."""


class Pipe:
    """One direction between two processes."""

    def __init__(self, world: World, faults: Faults, deliver: Callable[[bytes], None]) -> None:
        self._world = world
        self._faults = faults
        self._deliver: Callable[[bytes], None] | None = deliver
        self._frames: deque[bytes] = deque()

    def send(self, kind: str, fields: dict[str, Any]) -> None:
        """Let a message arrive later, behind those before it."""
        frame = encode(kind, **fields)
        for _ in range(self._faults.copies(kind)):
            self._frames.append(frame)
            self._world.soon(LATENCY, self._arrive)

    def cut(self) -> None:
        """Let nothing arrive any more."""
        self._deliver = None

    def _arrive(self) -> None:
        if self._deliver is not None:
            self._deliver(self._frames.popleft())


class Link:
    """A worker's connection to one controller."""

    def __init__(
        self, end: ControllerEnd, identity: bytes, on_command: Callable[[Message], None]
    ) -> None:
        world, faults = end.world, end.faults
        self.to_worker = Pipe(world, faults, lambda frame: on_command(decode(frame, COMMANDS)))
        self.to_controller = Pipe(
            world, faults, lambda frame: end.deliver(identity, decode(frame, EVENTS))
        )
        self.is_cut = False

    def cut(self) -> None:
        """End it, with all that is on its way."""
        self.is_cut = True
        self.to_worker.cut()
        self.to_controller.cut()


class ControllerEnd:
    """What a controller has: see `reactor.control.platform.Bus`."""

    def __init__(
        self, world: World, faults: Faults, deliver: Callable[[bytes, Message], None]
    ) -> None:
        self.world = world
        self.faults = faults
        self.deliver = deliver
        self.links: dict[bytes, Link] = {}
        self.closed = False

    def send(self, worker: bytes, kind: str, **fields: Any) -> bool:
        """Queue a command."""
        assert kind in COMMANDS
        link = self.links.get(worker)
        if link is None or link.is_cut or self.closed:
            return False
        if self.world.trace is not None:
            self.world.note("to %s: %s %s", worker.decode(), kind, _brief(fields))
        link.to_worker.send(kind, fields)
        return True

    def close(self) -> None:
        """Cut every connection."""
        self.closed = True
        for link in self.links.values():
            link.cut()


class Hub:
    """The path that controllers listen on, one after the other, and workers connect to."""

    def __init__(self, world: World, faults: Faults) -> None:
        self._world = world
        self._faults = faults
        self._end: ControllerEnd | None = None
        self._workers: dict[bytes, WorkerEnd] = {}

    def listen(self, deliver: Callable[[bytes, Message], None]) -> ControllerEnd:
        """Be the controller."""
        end = self._end = ControllerEnd(self._world, self._faults, deliver)
        for worker in self._workers.values():
            self._world.soon(CONNECT_SECONDS, self._link, worker)
        return end

    def connect(self, identity: bytes, on_command: Callable[[Message], None]) -> WorkerEnd:
        """Be a worker."""
        worker = self._workers[identity] = WorkerEnd(self, identity, on_command)
        self._world.soon(0.05, self._link, worker)
        return worker

    def forget(self, identity: bytes) -> None:
        """Let a worker go."""
        self._workers.pop(identity, None)

    def _link(self, worker: WorkerEnd) -> None:
        end = self._end
        if end is None or end.closed or worker.closed:
            return
        worker.link = end.links[worker.identity] = Link(end, worker.identity, worker.on_command)


class WorkerEnd:
    """What a worker has."""

    def __init__(self, hub: Hub, identity: bytes, on_command: Callable[[Message], None]) -> None:
        self.identity = identity
        self.on_command = on_command
        self.link: Link | None = None
        self.closed = False
        self._hub = hub

    def send(self, kind: str, **fields: Any) -> bool:
        """Queue an event; False when no controller listens."""
        assert kind in EVENTS
        if self.link is None or self.link.is_cut:
            return False
        self.link.to_controller.send(kind, fields)
        return True

    def close(self) -> None:
        """Cut the connection."""
        self.closed = True
        if self.link is not None:
            self.link.cut()
        self._hub.forget(self.identity)


def _brief(fields: dict[str, Any]) -> str:
    spec = fields.get("spec")
    if spec is not None:
        fields = {**fields, "spec": f"{spec['name']} {spec['options']}"}
    return " ".join(f"{name}={value}" for name, value in fields.items())

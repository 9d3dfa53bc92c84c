"""The control bus: ZeroMQ ROUTER in the controller, DEALER in each worker, over ipc.

Descriptors cannot cross ZeroMQ; they go to the worker's own datagram socket beside the bus.
ZeroMQ's descriptor is edge-triggered: after every wake-up, and after every send, the socket's
EVENTS are looked at and everything is received. That is hidden here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import zmq

from reactor import background
from reactor.errors import BusError
from reactor.log import logger
from reactor.loop import Reactor
from reactor.messages import COMMANDS, EVENTS, MESSAGE_MAX, Message, decode, encode

QUEUE_MAX: Final = 10_000  # messages to one peer; beyond, sending is refused
MESSAGES_PER_TURN: Final = 64
THREADS: Final = 2  # of ZeroMQ: for I/O, and to end sockets
DESCRIPTORS: Final = 8  # of these threads and the first socket, and some to spare
RECEIVE_BYTES: Final = 4096  # a descriptor's header

log = logger(__name__)


def _prove_room() -> None:
    """Raise OSError where ZeroMQ would end the process: for want of threads or descriptors."""
    descriptors: list[int] = []
    try:
        descriptors.extend(os.eventfd(0) for _ in range(DESCRIPTORS))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    background.prove(THREADS)


class _Socket:
    """A ZeroMQ socket in a reactor."""

    def __init__(self, reactor: Reactor, kind: int, name: str) -> None:
        self._reactor = reactor
        _prove_room()
        try:
            self._context = zmq.Context(io_threads=1)
            self._socket = self._context.socket(kind)
        except zmq.ZMQError as error:
            raise OSError(error.errno, f"control bus: {error}") from error
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.SNDHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.RCVHWM, QUEUE_MAX)
        self._socket.setsockopt(zmq.MAXMSGSIZE, MESSAGE_MAX)
        fd = self._socket.getsockopt(zmq.FD)
        assert isinstance(fd, int)
        self._fd = fd
        self._drain_due = False
        reactor.add_fd(fd, self._on_ready, name=name)

    def close(self) -> None:
        self._reactor.remove_fd(self._fd)
        self._socket.close()
        self._context.term()

    def _on_ready(self, _events: int) -> bool:
        return self._drain()

    def _drain(self) -> bool:
        self._drain_due = False
        for _ in range(MESSAGES_PER_TURN):
            if self._socket.closed or not self._readable():
                return True
            try:
                self._received(self._socket.recv_multipart(zmq.NOBLOCK))
            except MemoryError:
                self._reactor.lose()
                log.error("a control message could not be handled: out of memory")
            except Exception:
                # A bug, but what follows must be received: the descriptor tells of it only once.
                log.exception("a control message could not be handled")
        self._look_again()
        return True

    def _look_again(self) -> None:
        if not self._drain_due:
            self._reactor.call_from_thread(self._drain)
            self._drain_due = True

    def _readable(self) -> bool:
        events = self._socket.getsockopt(zmq.EVENTS)
        return isinstance(events, int) and bool(events & zmq.POLLIN)

    def _send(self, frames: Sequence[bytes]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        finally:
            if self._readable():
                self._look_again()

    def _received(self, frames: list[bytes]) -> None:
        raise NotImplementedError


class ControllerBus(_Socket):
    """The controller's end: knows workers by the identity that each connects with."""

    def __init__(
        self, reactor: Reactor, path: Path, on_event: Callable[[bytes, Message], None]
    ) -> None:
        super().__init__(reactor, zmq.ROUTER, "bus")
        self._on_event = on_event
        # A worker that came back under its old identity replaces the dead connection.
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        mask = os.umask(0o177)  # the socket must never be open to others, not even for a moment
        try:
            self._socket.bind(f"ipc://{path}")
        except zmq.ZMQError as error:
            raise BusError(f"control bus {path}: {error}") from error
        finally:
            os.umask(mask)

    def send(self, worker: bytes, kind: str, **fields: Any) -> bool:
        """Queue a command for `worker`; False when it is not connected or does not receive."""
        assert kind in COMMANDS
        try:
            self._send([worker, encode(kind, **fields)])
        except zmq.ZMQError as error:
            log.debug("worker %s cannot be reached: %s", worker.decode(), error)
            return False
        return True

    def _received(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise BusError(f"control message of {len(frames)} frames")
            message = decode(frames[1], EVENTS)
        except BusError as error:
            log.warning("from %r: %s", frames[0][:64], error)
            return
        self._on_event(frames[0], message)


class WorkerBus(_Socket):
    """A worker's end; it connects again by itself when a new controller binds the path."""

    def __init__(
        self, reactor: Reactor, path: Path, identity: bytes, on_command: Callable[[Message], None]
    ) -> None:
        super().__init__(reactor, zmq.DEALER, "bus")
        self.events = 0  # sent or lost since the hello, but for heartbeats
        self._on_command = on_command
        self._socket.setsockopt(zmq.IDENTITY, identity)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        # No connection yet, nothing queued: a new controller wants news, not history.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.connect(f"ipc://{path}")

    def send(self, kind: str, **fields: Any) -> bool:
        """Queue an event; False when no controller listens."""
        assert kind in EVENTS
        self.events += kind != "statistics"
        try:
            self._send([encode(kind, **fields)])
        except zmq.Again:
            return False
        return True

    def _received(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 1:
                raise BusError(f"control message of {len(frames)} frames")
            message = decode(frames[0], COMMANDS)
        except BusError as error:
            log.warning("from the controller: %s", error)
            return
        self._on_command(message)


def descriptor_socket(runtime_dir: Path, core: int) -> Path:
    """Return the path of the worker's socket for descriptors."""
    return runtime_dir / f"worker-{core}.sock"


def send_descriptors(path: Path, fds: Sequence[int], header: bytes) -> None:
    """Hand copies of `fds` to the worker that listens on `path`; raises OSError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
        sender.connect(os.fspath(path))
        socket.send_fds(sender, [header], list(fds))

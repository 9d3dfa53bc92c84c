"""What the tests on a real kernel need: root, the nbd driver, and a server for its sockets."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.api import COMMAND, FLAGS, Buffer, Channel, Disk, Owner, Request, SimpleChannel
from reactor.attach.device import DEVICE_IO, Device, attach
from reactor.data.connection import Connection
from reactor.loop import Reactor
from reactor.protocol import wire
from reactor.protocol.export import Export

MIB = 1 << 20
SIZE = 16 * MIB
FLAGS_ALL = (
    wire.NBD_FLAG_HAS_FLAGS
    | wire.NBD_FLAG_SEND_FLUSH
    | wire.NBD_FLAG_SEND_FUA
    | wire.NBD_FLAG_SEND_TRIM
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a kernel where there is none."""
    if os.geteuid() == 0 and Path("/sys/module/nbd").exists():
        return
    reason = "needs root and the nbd driver: run it in tools/kernel"
    for item in items:
        if item.get_closest_marker("kernel"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _device_io() -> Iterator[None]:
    """End the process that tests have made of this one need for their devices."""
    yield
    DEVICE_IO.close()


class Memory(Disk):
    """A disk in this process, with a note of what was asked of it."""

    can_trim = can_fua = can_multi_conn = True

    def __init__(self) -> None:
        super().__init__("memory", SIZE, 512, readonly=False)
        self.data = bytearray(SIZE)
        self.seen: list[tuple[int, int]] = []  # (command, flags)

    def channel(self, reactor: Reactor) -> Channel:
        return MemoryChannel(self)


class MemoryChannel(SimpleChannel):
    disk: Memory

    def read(self, offset: int, length: int) -> Buffer:
        return self.disk.data[offset : offset + length]

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        self.disk.data[offset : offset + len(data)] = data

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        self.disk.seen.append((request[COMMAND], request[FLAGS]))
        return super().submit(request, owner)


class Server:
    """The worker's part, in a thread: serves the ends of socket pairs from one memory disk."""

    def __init__(self, disk: Memory | None = None) -> None:
        self.disk = disk or Memory()
        self.flags = FLAGS_ALL
        self._reactor = Reactor("interrupt")
        self._channel = self.disk.channel(self._reactor)
        self._connections: set[Connection] = set()
        self._resumed = threading.Event()
        self._resumed.set()
        self._dying = threading.Event()
        self._thread = threading.Thread(target=self._reactor.run)
        self._thread.start()

    def connect(self) -> socket.socket:
        """Serve a new socket pair; returns the kernel's end."""
        kernel_end, worker_end = socket.socketpair()
        self.serve(worker_end)
        return kernel_end

    def serve(self, worker_end: socket.socket) -> None:
        """Serve this end."""
        export = Export("memory", "", SIZE, 512, self.flags)

        def begin() -> None:
            forget = self._forget
            connection = Connection(self._reactor, worker_end, export, self._channel, forget)
            self._connections.add(connection)

        self.call(begin)

    def die(self) -> None:
        """Close every connection at once, as a killed worker does; a stall ends with it."""
        self._dying.set()
        self._resumed.set()
        self.call(self._close_all)
        self._dying.clear()

    def stall(self) -> None:
        """Serve nothing until `resume`, or nothing more at all when it dies."""

        def wait() -> None:
            self._resumed.wait()
            if self._dying.is_set():  # before the loop reads what came meanwhile
                self._close_all()

        self._resumed.clear()
        self._reactor.call_from_thread(wait)

    def resume(self) -> None:
        """Serve again."""
        self._resumed.set()

    def call(self, function: Callable[[], object]) -> None:
        """Call `function` in the server's loop, and wait for it."""
        done = threading.Event()
        self._reactor.call_from_thread(lambda: (function(), done.set()))
        assert done.wait(10)

    def close(self) -> None:
        self.die()
        self.call(self._reactor.stop)
        self._thread.join()
        self._reactor.close()

    def _close_all(self) -> None:
        for connection in list(self._connections):
            connection.close("died")

    def _forget(self, connection: Connection, _reason: str) -> None:
        self._connections.discard(connection)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


Attach = Callable[..., Device]


@pytest.fixture
def attached(server: Server) -> Iterator[Attach]:
    """Attach devices to the server; they are detached at the end."""
    devices: list[Device] = []

    def make(device: str = "auto", way: str = "netlink", **settings: object) -> Device:
        count = settings.pop("connections", 1)
        given = {
            "tag": "nbd-reactor:test:memory",
            "size": SIZE,
            "block_size": 512,
            "flags": server.flags,
            "timeout": None,
            "dead_timeout": 60,
            **settings,
        }
        kernel_ends = [server.connect() for _ in range(count)]
        made = attach(device, way, kernel_ends=kernel_ends, **given)
        devices.append(made)
        return made

    yield make
    server.resume()
    for device in devices:
        device.detach()

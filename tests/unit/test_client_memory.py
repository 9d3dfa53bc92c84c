"""What many clients of a worker may occupy together."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest

from backends.api import Channel
from backends.malloc import MallocBackend
from reactor.data import clientmemory
from reactor.data.clientmemory import RESERVE, ClientMemory
from reactor.data.connection import Connection
from reactor.loop import Reactor, Timer
from reactor.protocol.wire import NBD_CMD_READ, NBD_CMD_WRITE
from tests.submitting import turn_until
from tests.unit.pumping import CallChannel, null_disk
from tests.unit.requests import export, reply, request

MIB = 1 << 20
SIZE = 64 * MIB
INSTANCE = "memorytest"
ALL = 8 * MIB
LARGE = 3 * MIB
TURNS = 50


class Worker:
    """A loop whose clock is the test's, and clients of one disk whose data is no memory of it."""

    def __init__(self) -> None:
        self.reactor = Reactor("poll")
        self.now = self.reactor.clock()
        self.reactor.clock = lambda: self.now
        self.memory = ClientMemory(self.reactor)
        self.clients: list[Client] = []

    def client(self, *, trusted: bool = False, channel: Channel | None = None) -> Client:
        self.clients.append(Client(self, None if trusted else self.memory, channel))
        return self.clients[-1]

    def turns(self) -> None:
        for _ in range(TURNS):
            self.reactor.turn()

    def wait(self, seconds: float) -> None:
        self.now += int(seconds * 1e9)
        self.turns()

    @property
    def occupied(self) -> int:
        """The bytes that are kept for all clients."""
        return sum(
            one.connection._outgoing.waiting + one.connection._receiver.memory_bytes
            for one in self.clients
            if not one.closed
        )


class Client:
    """A client that sends and reads only when it is told to."""

    def __init__(
        self, worker: Worker, memory: ClientMemory | None, channel: Channel | None = None
    ) -> None:
        self.worker = worker
        self.socket, served = socket.socketpair()
        self.socket.setblocking(False)
        self.closed: list[str] = []
        channel = channel or CallChannel(
            null_disk(SIZE), lambda asked: bytes(asked[4] if asked[0] == NBD_CMD_READ else 0)
        )
        self.connection = Connection(
            *(worker.reactor, served, export(size=SIZE), channel),
            lambda _, why: self.closed.append(why),
            memory=memory,
        )

    def send(self, data: bytes) -> int:
        """Send as much as is taken; returns how much."""
        sent = 0
        for _ in range(TURNS):
            with contextlib.suppress(BlockingIOError):
                sent += self.socket.send(data[sent:])
            self.worker.reactor.turn()
        return sent

    def receive(self, count: int) -> bytes:
        received = bytearray()

        def enough() -> bool:
            with contextlib.suppress(BlockingIOError):
                received.extend(self.socket.recv(count - len(received)))
            return len(received) == count

        turn_until(self.worker.reactor, enough)
        return bytes(received)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[Worker]:
    monkeypatch.setattr(clientmemory, "BYTES_MAX", ALL)
    worker = Worker()
    yield worker
    for client in worker.clients:
        client.socket.close()
        client.connection.close("the test is over")
    worker.turns()
    assert worker.memory.left == ALL
    worker.reactor.close()


READ = request(NBD_CMD_READ, 0, LARGE)
WRITE = request(NBD_CMD_WRITE, payload=bytes(LARGE))


@pytest.mark.parametrize("length", [MIB // 16, MIB, LARGE])
def test_clients_that_do_not_read_occupy_no_more_than_there_is(worker: Worker, length: int) -> None:
    slow = [worker.client() for _ in range(20)]
    for one in slow:
        one.send(request(NBD_CMD_READ, 0, length) * (16 * MIB // length))
    assert worker.memory.left <= LARGE
    assert worker.occupied <= ALL + 20 * (RESERVE + length)
    other = worker.client()
    other.send(request(NBD_CMD_READ, 0, 4096))
    assert other.receive(16 + 4096) == reply(1, 0, bytes(4096))
    assert not any(one.closed for one in slow)


@pytest.mark.parametrize("length", [MIB // 16, MIB, LARGE])
def test_what_was_never_written_to_a_memory_disk_is_counted(worker: Worker, length: int) -> None:
    """It is read as a copy; what was written is sent from where it is."""
    disk = MallocBackend.create(
        "m",
        {"size": SIZE},
        instance=INSTANCE,
        reactor=worker.reactor,
        block_size=None,
        readonly=False,
        shared=False,
    )
    try:
        channel = disk.channel(worker.reactor)
        slow = [worker.client(channel=channel) for _ in range(20)]
        for one in slow:
            one.send(request(NBD_CMD_READ, 0, length) * (16 * MIB // length))
        assert worker.memory.left <= LARGE
        assert worker.occupied <= ALL + 20 * (RESERVE + length)
        writer = worker.client(channel=channel)
        writer.send(request(NBD_CMD_WRITE, 32 * MIB, payload=bytes(MIB // 2)))
        assert writer.receive(16) == reply(1)
        reader = worker.client(channel=channel)
        reader.send(request(NBD_CMD_READ, 32 * MIB, MIB // 2) * 8)
        worker.turns()
        assert reader.connection._outgoing.waiting > RESERVE
        assert reader.connection._share.bytes == 0
    finally:
        for one in worker.clients:
            one.connection.close("the test is over")
        worker.turns()
        disk.close()
        MallocBackend.discard("m", INSTANCE)


def test_a_large_read_waits_and_comes_when_the_slow_are_closed(worker: Worker) -> None:
    slow = [worker.client() for _ in range(5)]
    for one in slow:
        one.send(READ * 5)
    other = worker.client()
    other.send(READ)
    for _ in range(60):
        worker.wait(1)
    assert any(one.closed for one in slow)
    assert other.receive(16 + LARGE) == reply(1, 0, bytes(LARGE))


def test_writes_that_never_end_occupy_no_more_than_there_is(worker: Worker) -> None:
    slow = [worker.client() for _ in range(20)]
    for one in slow:
        one.send(WRITE[:-1])
    assert worker.occupied <= ALL + 20 * RESERVE
    other = worker.client()
    sent = other.send(WRITE)
    assert sent < len(WRITE)  # it is not read
    for _ in range(150):
        worker.wait(1)
        sent += other.send(WRITE[sent:])
    assert other.receive(16) == reply(1)
    closed = [one.closed for one in slow if one.closed]
    assert closed[0] == ["its peer is slow, and others need the memory"]


def test_who_takes_its_replies_is_not_closed_though_others_wait(worker: Worker) -> None:
    reader, others = worker.client(), [worker.client() for _ in range(2)]
    for one in (reader, *others):
        one.send(READ * 8)
    for _ in range(8):
        reader.receive(16 + LARGE)
        worker.wait(11)
    assert not reader.closed


def test_nobody_is_closed_while_nobody_waits(worker: Worker) -> None:
    slow = worker.client()
    slow.send(READ)
    for _ in range(100):
        worker.wait(1)
    assert not slow.closed


def test_the_kernel_does_not_wait_for_clients(worker: Worker) -> None:
    for _ in range(5):
        worker.client().send(READ * 5)
    kernel = worker.client(trusted=True)
    kernel.send(READ)
    assert kernel.receive(16 + LARGE) == reply(1, 0, bytes(LARGE))
    kernel.send(WRITE)
    assert kernel.receive(16) == reply(1)


def test_who_waits_goes_on_though_there_was_no_memory_to_wake_it(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, first, waiting = (worker.client() for _ in range(3))
    slow.send(READ * 2)
    first.send(request(NBD_CMD_READ, 0, RESERVE + MIB // 4))
    free = worker.memory.left + first.connection._share.bytes
    length = free - free % 4096
    waiting.send(request(NBD_CMD_READ, 0, length))
    assert list(worker.memory._waiting) == [waiting.connection]

    failures: list[float] = []
    call_later = worker.reactor.call_later

    def fail_once(seconds: float, function: Callable[[], None]) -> Timer:
        if function == worker.memory._resume and not failures:
            failures.append(seconds)
            raise MemoryError
        return call_later(seconds, function)

    monkeypatch.setattr(worker.reactor, "call_later", fail_once)
    first.receive(MIB // 4)
    turn_until(worker.reactor, lambda: first.closed)
    assert waiting.receive(16 + length) == reply(1, 0, bytes(length))


def test_memory_kept_for_the_next_payload_is_given_to_who_needs_it(worker: Worker) -> None:
    for _ in range(10):
        client = worker.client()
        client.send(WRITE)
        assert client.receive(16) == reply(1)

"""What a disk cannot do by itself, done with what it can."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from backends.api import Buffer, Channel, Disk, Owner, Request, SimpleChannel
from backends.emulation import WRITE_BYTES, EmulationChannel, open_channel
from reactor.loop import Reactor
from reactor.protocol.export import Export
from tests.unit.pumping import CallChannel, HeldChannel, Pump, null_disk
from tests.unit.requests import replies, reply, request

READ, WRITE, _, FLUSH, TRIM, CACHE, ZEROES = range(7)
FUA, NO_HOLE, FAST_ZERO = 1, 2, 16
SIZE = 16 << 20


class BareDisk(Disk):
    """A disk on a bytearray that can do no more than it must; keeps a journal of its verbs."""

    can_trim = True

    def __init__(self, size: int = SIZE) -> None:
        super().__init__("bare", size, 512, readonly=False)
        self.data = bytearray(size)
        self.journal: list[tuple[object, ...]] = []

    def channel(self, reactor: Reactor) -> Channel:
        return BareChannel(self)


class BareChannel(SimpleChannel):
    """Its channel."""

    disk: BareDisk

    def read(self, offset: int, length: int) -> Buffer:
        return bytes(self.disk.data[offset : offset + length])

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        assert not fua
        self.disk.journal.append(("write", offset, len(data)))
        self.disk.data[offset : offset + len(data)] = data

    def flush(self) -> None:
        self.disk.journal.append(("flush",))

    def trim(self, offset: int, length: int) -> None:
        self.disk.journal.append(("trim", offset, length))


class FlushlessDisk(BareDisk):
    """A disk whose writes are durable at once."""

    can_flush = False


class FuaDisk(BareDisk):
    """A disk that cannot write zeroes, but can FUA."""

    can_fua = True


Serve = Callable[..., Pump]


@pytest.fixture
def serve() -> Iterator[Serve]:
    pumps: list[Pump] = []

    def start(disk: Disk, base: Channel | None = None, flags: int = 1 | 4 | 8 | 32 | 64) -> Pump:
        pump = Pump(disk=disk, export=Export("disk", "", disk.size, 512, flags))
        pumps.append(pump)
        channel = EmulationChannel(base, pump.reactor) if base else open_channel(disk, pump.reactor)
        pump.connection._channel = channel
        return pump

    yield start
    for pump in pumps:
        pump.__exit__()


def test_a_disk_that_can_do_all_is_not_wrapped() -> None:
    disk, reactor = null_disk(), Reactor()
    assert not isinstance(open_channel(disk, reactor), EmulationChannel)
    assert isinstance(open_channel(BareDisk(), reactor), EmulationChannel)
    reactor.close()


def test_fua_is_a_write_and_a_flush(serve: Serve) -> None:
    disk = BareDisk()
    pump = serve(disk)
    assert pump.ask(request(WRITE, 512, payload=b"x" * 512, flags=FUA)) == [(1, 0, b"")]
    assert disk.journal == [("write", 512, 512), ("flush",)]
    assert disk.data[512:1024] == b"x" * 512
    assert pump.connection.counters.writes == 1
    assert pump.connection.counters.flushes == 0


def test_a_trim_with_fua_is_flushed(serve: Serve) -> None:
    disk = BareDisk()
    pump = serve(disk)
    pump.ask(request(TRIM, 0, 512, flags=FUA))
    assert disk.journal == [("trim", 0, 512), ("flush",)]


@pytest.mark.parametrize("command", [READ, CACHE, FLUSH])
def test_fua_means_nothing_where_nothing_changes(serve: Serve, command: int) -> None:
    disk = BareDisk()
    pump = serve(disk, flags=1 | 4 | 8 | 1024)
    length = 0 if command == FLUSH else 512
    data = bytes(512) if command == READ else b""
    pump.send(request(command, 0, length, flags=FUA))
    assert pump.receive(16 + len(data)) == reply(1, data=data)
    assert disk.journal == ([("flush",)] if command == FLUSH else [])


def test_a_disk_without_a_cache_needs_no_flush_for_fua(serve: Serve) -> None:
    disk = FlushlessDisk()
    serve(disk).ask(request(WRITE, 0, payload=bytes(512), flags=FUA))
    assert disk.journal == [("write", 0, 512)]


def test_short_zeroes_are_written_at_once(serve: Serve) -> None:
    disk = BareDisk()
    disk.data[:] = b"x" * SIZE
    pump = serve(disk)
    pump.ask(request(ZEROES, 512, 1024))
    assert disk.journal == [("write", 512, 1024)]
    assert disk.data[:2048] == b"x" * 512 + bytes(1024) + b"x" * 512


def test_long_zeroes_are_bounded_writes_that_leave_turns_to_others(serve: Serve) -> None:
    disk = BareDisk()
    disk.data[:] = b"x" * SIZE
    pump = serve(disk)
    pump.send(
        request(ZEROES, 512, SIZE - 1024, flags=FUA | NO_HOLE) + request(READ, 0, 512, cookie=2)
    )
    answers = replies(pump.receive(16 + 16 + 512), {2: 512})
    assert answers == [(2, 0, b"x" * 512), (1, 0, b"")]
    assert disk.data == b"x" * 512 + bytes(SIZE - 1024) + b"x" * 512
    *writes, last = disk.journal
    assert last == ("flush",)
    assert all(verb == "write" and length <= WRITE_BYTES for verb, _, length in writes)
    assert sum(length for _, _, length in writes) == SIZE - 1024
    assert pump.connection.counters.zeroes == 1


def test_fast_zeroes_are_refused_since_writing_is_not_fast(serve: Serve) -> None:
    disk = BareDisk()
    pump = serve(disk, flags=1 | 64 | 1 << 11)
    assert pump.ask(request(ZEROES, 0, 512, flags=FAST_ZERO)) == [(1, 95, b"")]
    assert not disk.journal


def test_zeroes_with_fua_on_a_disk_that_can_fua_need_no_flush(serve: Serve) -> None:
    disk = FuaDisk()
    held = HeldChannel(disk)
    pump = serve(disk, held)
    pump.ask(request(ZEROES, 0, 512, flags=FUA))
    assert [(entry[0], entry[1]) for entry, _ in held.pending] == [(WRITE, FUA)]
    held.finish()
    assert pump.receive(16) == reply(1)


def test_pending_steps_follow_each_other(serve: Serve) -> None:
    disk = BareDisk()
    held = HeldChannel(disk)
    pump = serve(disk, held)
    pump.ask(request(ZEROES, 0, 2 * WRITE_BYTES + 512, flags=FUA))
    seen = []
    while held.pending:
        (entry, _), *others = held.pending
        assert not others, "one at a time"
        seen.append((entry[0], entry[1], entry[3], entry[4]))
        assert not pump.drain_client()
        held.finish()
        pump.turns()
    assert seen == [
        (WRITE, 0, 0, WRITE_BYTES),
        (WRITE, 0, WRITE_BYTES, WRITE_BYTES),
        (WRITE, 0, 2 * WRITE_BYTES, 512),
        (FLUSH, 0, 0, 0),
    ]
    assert pump.receive(16) == reply(1)
    assert pump.connection.idle


@pytest.mark.parametrize("failing", [0, 1])
def test_a_pending_step_that_fails_fails_the_request(serve: Serve, failing: int) -> None:
    disk = BareDisk()
    held = HeldChannel(disk)
    pump = serve(disk, held)
    pump.ask(request(WRITE, 0, payload=bytes(512), flags=FUA))
    if failing:
        held.finish()
        pump.turns()
    held.finish(error=errno.ENOSPC)
    assert pump.receive(16) == reply(1, 28)
    assert not held.pending


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError(errno.ENOSPC, "full"), 28), (ZeroDivisionError(), 5)]
)
@pytest.mark.parametrize("good_steps", [0, 1, 4])
def test_a_step_that_raises_fails_the_request_once(
    serve: Serve, error: Exception, expected: int, good_steps: int
) -> None:
    calls: list[int] = []

    def fail(request: Request) -> Buffer | None:
        calls.append(request[0])
        if len(calls) > good_steps:
            raise error
        return b""

    disk = BareDisk()
    pump = serve(disk, CallChannel(disk, fail))
    pump.send(request(ZEROES, 0, 8 * WRITE_BYTES))
    assert pump.receive(16) == reply(1, expected)
    pump.turns()
    assert len(calls) == good_steps + 1
    assert pump.connection.idle


def test_a_busy_base_keeps_the_payload_and_loses_nothing(serve: Serve) -> None:
    disk = BareDisk()
    held = HeldChannel(disk, room=1)
    pump = serve(disk, held)
    payloads = [bytes([i]) * 512 for i in range(10)]
    for i, payload in enumerate(payloads):
        pump.ask(request(WRITE, 512 * i, cookie=i, payload=payload, flags=FUA))
    stream = b""
    while held.pending:
        held.finish_all()
        pump.turns()
        stream += pump.drain_client()
    assert sorted(replies(stream, {})) == [(i, 0, b"") for i in range(10)]
    written = {offset: data for _, offset, length, data in held.submitted if length}
    assert written == {512 * i: payload for i, payload in enumerate(payloads)}
    assert pump.connection.idle


def test_plain_requests_pass_with_their_own_owner(serve: Serve) -> None:
    disk = BareDisk()
    held = HeldChannel(disk)
    pump = serve(disk, held)
    pump.ask(request(READ, 0, 512))
    assert held.pending[0][1] is pump.connection
    held.finish()
    pump.receive(16 + 512)


def test_what_is_no_request_is_passed_to_the_base() -> None:
    called: list[object] = []

    class Base(HeldChannel):
        def abandon(self, owner: Owner) -> None:
            called.append(owner)

        def rest(self) -> None:
            called.append("rest")

        def close(self) -> None:
            called.append("close")

    reactor = Reactor()
    channel = EmulationChannel(Base(BareDisk()), reactor)
    owner = cast("Owner", object())
    channel.abandon(owner)
    channel.rest()
    channel.close()
    reactor.close()
    assert called == [owner, "rest", "close"]

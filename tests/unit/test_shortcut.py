"""Plain requests to memory: the same results as by `submit`, however the stream is cut."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator

import pytest

from backends.malloc import BACKEND, MallocDisk
from backends.sharedmemory import CHUNK, shared_memory
from reactor.loop import Reactor
from reactor.protocol.export import Export
from reactor.protocol.transmission import REQUESTS_MAX
from tests.unit.pumping import Pump
from tests.unit.requests import EVERYTHING, READ_ONLY, replies, request

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)
FUA = 1
SIZE = 4 << 20
INSTANCE = f"shortcut-{os.getpid()}"


@pytest.fixture
def disk() -> Iterator[MallocDisk]:
    reactor = Reactor("poll")
    made = BACKEND.create(
        "disk",
        {"size": SIZE},
        instance=INSTANCE,
        reactor=reactor,
        block_size=512,
        readonly=False,
        shared=False,
    )
    assert isinstance(made, MallocDisk)
    yield made
    made.close()
    reactor.close()
    BACKEND.discard("disk", INSTANCE)


def serve(disk: MallocDisk, flags: int = EVERYTHING, block_size: int = 512) -> Pump:
    export = Export("disk", "", disk.size, block_size, flags)
    pump = Pump(disk=disk, export=export)
    assert pump.channel.memory is disk.memory
    return pump


def answers(pump: Pump, count: int, reads: dict[int, int]) -> dict[int, tuple[int, bytes]]:
    """Receive `count` replies; returns (error, data) by cookie."""
    stream = pump.receive(16 * count + sum(reads.values()))
    found = replies(stream, reads)
    assert len({cookie for cookie, *_ in found}) == len(found) == count
    return {cookie: (error, data) for cookie, error, data in found}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backed", [True, False])
def test_any_stream_cut_anywhere_does_what_it_says(
    disk: MallocDisk, seed: int, backed: bool
) -> None:
    randomly = random.Random(seed)
    model = bytearray(SIZE)
    if backed:
        disk.memory.back(0, SIZE)
    with serve(disk) as pump:
        for _ in range(12):
            # The reads are in flight together with the writes: only their length is certain.
            stream, reads = b"", {}
            count = randomly.randint(1, 40)
            for cookie in range(1, count + 1):
                command = randomly.choice([READ, READ, WRITE, WRITE, WRITE, FLUSH, ZEROES])
                length = 512 * randomly.choice([1, 8, 8, 8, 64, 256, 700, 2500])
                if command == ZEROES:  # longer ones take turns, so that others overtake them
                    length = min(length, 64 << 10)
                offset = 512 * randomly.randint(0, (SIZE - length) // 512)
                flags = randomly.choice([0, 0, 0, FUA])
                if command == READ:
                    stream += request(READ, offset, length, cookie=cookie)
                    reads[cookie] = length
                elif command == WRITE:
                    payload = randomly.randbytes(512) * (length // 512)
                    stream += request(WRITE, offset, cookie=cookie, flags=flags, payload=payload)
                    model[offset : offset + length] = payload
                elif command == FLUSH:
                    stream += request(FLUSH, cookie=cookie)
                else:
                    stream += request(ZEROES, offset, length, cookie=cookie, flags=flags)
                    model[offset : offset + length] = bytes(length)
            most = randomly.choice([1 << 20, 100_000, 5000])
            while stream:
                piece = randomly.randint(1, most)
                pump.send(stream[:piece])
                stream = stream[piece:]
                pump.turns(1)
            found = answers(pump, count, reads)
            assert {error for error, _ in found.values()} == {0}
        pump.send(request(READ, 0, SIZE, cookie=99))
        assert pump.receive(16 + SIZE)[16:] == model
        assert pump.connection.counters.errors == 0


def test_a_long_payload_is_received_in_its_place(disk: MallocDisk) -> None:
    disk.memory.back(0, SIZE)
    payload = random.Random(1).randbytes(1 << 20)
    stream = request(WRITE, 512, cookie=5, payload=payload)
    with serve(disk) as pump:
        pump.send(stream[:100_000])
        pump.turns()
        assert disk.memory.data[512 : 512 + 90_000] == payload[:90_000]  # before all has come
        assert pump.connection.counters.writes == 0
        assert pump.drain_client() == b""
        pump.send(stream[100_000:] + request(READ, 512, 512, cookie=6))
        found = answers(pump, 2, {6: 512})
        assert found == {5: (0, b""), 6: (0, payload[:512])}
        assert disk.memory.data[512 : 512 + len(payload)] == payload
        assert pump.connection.counters.writes == 1
        assert pump.connection.counters.written_bytes == 1 << 20


def test_a_write_cut_off_in_its_place_is_not_answered(disk: MallocDisk) -> None:
    disk.memory.back(0, SIZE)
    with serve(disk) as pump:
        pump.send(request(WRITE, 0, payload=bytes(1 << 20))[:500_000])
        pump.turns()
        pump.client.shutdown(1)
        pump.until(lambda: pump.closed)
        assert "in the middle of a request" in pump.closed[0]
        assert pump.drain_client() == b""
        assert pump.connection.counters.writes == 0


def test_a_write_whose_place_lost_its_memory_fails_alone(disk: MallocDisk) -> None:
    disk.memory.back(0, SIZE)
    stream = request(WRITE, 2 << 20, cookie=1 << 63, payload=bytes(1 << 20))
    with serve(disk) as pump:
        pump.send(stream[:500_000])
        pump.turns()
        path = shared_memory("disk", INSTANCE)
        os.truncate(path, path.stat().st_size - SIZE + (1 << 20))  # as if /dev/shm were full
        pump.send(stream[500_000:] + request(READ, 0, 512, cookie=2))
        assert answers(pump, 2, {2: 512}) == {1 << 63: (errno.ENOSPC, b""), 2: (0, bytes(512))}


def test_after_refuse_only_the_write_on_its_way_is_done(disk: MallocDisk) -> None:
    disk.memory.back(0, SIZE)
    stream = request(WRITE, 0, cookie=1, payload=b"x" * (1 << 20))
    with serve(disk) as pump:
        pump.send(stream[:500_000])
        pump.turns()
        pump.connection.refuse()
        pump.send(stream[500_000:] + request(READ, 0, 512, cookie=2))
        assert answers(pump, 2, {}) == {1: (0, b""), 2: (errno.ESHUTDOWN, b"")}


@pytest.mark.parametrize(
    ("flags", "stream", "error"),
    [
        (EVERYTHING | READ_ONLY, request(WRITE, 0, payload=bytes(512)), errno.EPERM),
        (EVERYTHING | READ_ONLY, request(WRITE, 0, payload=bytes(1 << 20)), errno.EPERM),
        (EVERYTHING, request(WRITE, SIZE, payload=bytes(512)), errno.ENOSPC),
        (EVERYTHING, request(WRITE, SIZE - 512, payload=bytes(1 << 20)), errno.ENOSPC),
        (EVERYTHING, request(WRITE, 256, payload=bytes(512)), errno.EINVAL),
        (EVERYTHING, request(READ, SIZE, 512), errno.EINVAL),
        (EVERYTHING, request(READ, (1 << 64) - 512, 512), errno.EINVAL),
        (EVERYTHING, request(READ, 0, 100), errno.EINVAL),
        (EVERYTHING, request(READ, 0, 512, flags=1 << 9), errno.EINVAL),
        (EVERYTHING, request(READ, 0, 0), 0),
        (EVERYTHING, request(CACHE, 0, 512), 0),
    ],
)
def test_what_is_wrong_or_not_plain_is_judged_as_ever(
    disk: MallocDisk, flags: int, stream: bytes, error: int
) -> None:
    disk.memory.back(0, SIZE)
    with serve(disk, flags) as pump:
        pump.send(stream + request(READ, 0, 512, cookie=77))
        found = answers(pump, 2, {77: 512})
        assert found.pop(77) == (0, bytes(512))
        assert [error for error, _ in found.values()] == [error]


def test_reading_a_hole_takes_no_memory(disk: MallocDisk) -> None:
    with serve(disk) as pump:
        for offset in (0, CHUNK - 512, 2 * CHUNK):
            pump.send(request(READ, offset, 1024, cookie=offset))
            assert answers(pump, 1, {offset: 1024}) == {offset: (0, bytes(1024))}
        assert not any(disk.memory.backed)


@pytest.mark.parametrize("backed", [0, CHUNK])
def test_reading_across_the_border_of_a_hole_takes_no_memory(disk: MallocDisk, backed: int) -> None:
    disk.memory.back(backed, backed + CHUNK)
    before = os.fstat(disk.memory.fd).st_blocks
    with serve(disk) as pump:
        pump.send(request(READ, CHUNK - 4096, 8192, cookie=3))
        assert answers(pump, 1, {3: 8192}) == {3: (0, bytes(8192))}
    assert os.fstat(disk.memory.fd).st_blocks == before


def test_a_flood_of_reads_is_answered_in_bounded_batches(disk: MallocDisk) -> None:
    disk.memory.back(0, SIZE)
    flood = b"".join(request(READ, 0, 65536, cookie=i) for i in range(3000))
    with serve(disk) as pump:
        pump.send(flood)
        pump.turns(50)  # the client does not read: nothing more is received
        assert pump.connection.counters.reads <= 2 * REQUESTS_MAX < 3000
        before = pump.connection.counters.reads
        pump.turns(50)
        assert pump.connection.counters.reads == before
        received = 0
        while received < 3000 * (16 + 65536):
            received += len(pump.drain_client(8 << 20))
            pump.turns(1)
        assert pump.connection.counters.reads == 3000


def test_a_resize_between_two_batches_counts(disk: MallocDisk) -> None:
    disk.memory.back(0, SIZE)
    with serve(disk) as pump:
        pump.send(request(WRITE, SIZE - 512, cookie=1, payload=b"x" * 512))
        assert answers(pump, 1, {}) == {1: (0, b"")}
        disk.resize(CHUNK)
        pump.export.size = disk.size
        pump.send(request(READ, SIZE - 512, 512, cookie=2))
        assert answers(pump, 1, {}) == {2: (errno.EINVAL, b"")}
        disk.resize(SIZE)
        pump.export.size = disk.size
        pump.send(request(READ, SIZE - 512, 512, cookie=3))
        assert answers(pump, 1, {3: 512}) == {3: (0, bytes(512))}

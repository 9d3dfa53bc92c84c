"""First writes to memory disks, which make memory: whose turn it is."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress

import pytest

from backends.api import DONE, Busy, Channel
from backends.malloc import BACKEND, NEW, MallocDisk
from backends.sharedmemory import CHUNK, shared_memory
from backends.turns import TURN_BYTES
from reactor.loop import Reactor
from reactor.protocol.wire import NBD_CMD_READ, NBD_CMD_WRITE

MIB = 1 << 20
INSTANCE = f"test-{os.getpid()}"

Make = Callable[[int], MallocDisk]


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor("poll")
    yield made
    made.close()


@pytest.fixture
def disks(reactor: Reactor) -> Iterator[Make]:
    """Makes disks of so many chunks."""
    made: list[MallocDisk] = []

    def make(chunks: int) -> MallocDisk:
        disk = BACKEND.create(
            f"disk-{len(made)}",
            {"size": chunks * CHUNK},
            instance=INSTANCE,
            reactor=reactor,
            block_size=512,
            readonly=False,
            shared=False,
            least=0,
        )
        assert isinstance(disk, MallocDisk)
        made.append(disk)
        return disk

    yield make
    for disk in made:
        disk.close()
        shared_memory(disk.name, INSTANCE).unlink()


class Writer:
    """Writes 512 bytes to each of some chunks, in order, whenever the channel has room."""

    def __init__(self, channel: Channel, chunks: Iterable[int]) -> None:
        self.done = 0
        self._channel = channel
        self._left = deque(chunks)

    def resume(self) -> None:
        with suppress(Busy):
            while self._left:
                offset = self._left[0] * CHUNK
                write = (NBD_CMD_WRITE, 0, 0, offset, 512, memoryview(b"w" * 512))
                assert self._channel.submit(write, self) == DONE
                self._left.popleft()
                self.done += 1

    def complete(self, *_: object, **__: object) -> None:
        raise AssertionError("a write is never pending")


class Reader:
    """Reads so many times 1 MiB, whenever the channel has room."""

    def __init__(self, channel: Channel, count: int) -> None:
        self.left = count
        self._channel = channel

    def resume(self) -> None:
        with suppress(Busy):
            while self.left:
                data = self._channel.submit((NBD_CMD_READ, 0, 0, 0, MIB, None), self)
                assert data == bytes(MIB)
                self.left -= 1

    def complete(self, *_: object, **__: object) -> None:
        raise AssertionError("a read is never pending")


def test_writes_to_new_memory_leave_turns_to_others(disks: Make, reactor: Reactor) -> None:
    per_step = TURN_BYTES // (NEW * CHUNK) + 1
    memory_disk = disks(1000)
    channel = memory_disk.channel(reactor)
    greedy, patient = Writer(channel, range(900)), Writer(channel, range(900, 1000))
    greedy.resume()
    patient.resume()
    assert (greedy.done, patient.done) == (per_step, 0)
    turns = []
    for _ in range(4):
        before = greedy.done, patient.done
        reactor.turn()
        turns.append((greedy.done - before[0], patient.done - before[1]))
    assert turns == [(per_step, 0), (0, per_step)] * 2
    while greedy.done + patient.done < 1000:
        reactor.turn()
    for chunk in range(1000):
        assert memory_disk.memory.read(chunk * CHUNK, 1024) == b"w" * 512 + bytes(512)


def test_the_disks_of_a_worker_share_a_turn(disks: Make, reactor: Reactor) -> None:
    channels = [disks(100).channel(reactor) for _ in range(8)]
    writers = [Writer(channel, range(100)) for channel in channels]
    for writer in writers:
        writer.resume()
    while any(writer.done < 100 for writer in writers):
        before = sum(writer.done for writer in writers)
        reactor.turn()
        made = sum(writer.done for writer in writers) - before
        assert 0 < made <= TURN_BYTES // (NEW * CHUNK) + len(writers)
    for channel in channels:
        channel.close()


def test_reads_of_what_was_never_written_leave_turns_to_others(
    disks: Make, reactor: Reactor
) -> None:
    channel = disks(1000).channel(reactor)
    reader = Reader(channel, 64)
    reader.resume()
    while reader.left:
        before = reader.left
        assert reactor.turn()
        assert 0 < before - reader.left <= TURN_BYTES // MIB
    channel.close()


def test_a_reader_that_leaves_while_it_waits_is_not_waited_for(
    disks: Make, reactor: Reactor, caplog: pytest.LogCaptureFixture
) -> None:
    channel = disks(1000).channel(reactor)
    reader = Reader(channel, 64)
    reader.resume()
    channel.abandon(reader)
    channel.close()
    reactor.turn()
    assert reader.left
    assert not caplog.records

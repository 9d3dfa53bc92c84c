"""Every disk, through a real connection, behaves as a list of blocks does."""

from __future__ import annotations

import os
from abc import abstractmethod

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from backends.api import Buffer, Disk, Owner, Request
from backends.emulation import open_channel
from backends.malloc import BACKEND
from reactor.loop import Reactor
from reactor.protocol.export import Export
from tests.unit.pumping import HeldChannel, Pump
from tests.unit.requests import EVERYTHING, replies, request
from tests.unit.test_emulation import BareChannel, BareDisk

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)
FUA, NO_HOLE = 1, 2
BLOCK = 512
BLOCKS_MAX = 3 * 2048 + 5  # three chunks of a memory disk and a bit

FLAGS = st.sampled_from([0, FUA])
FILLS = st.integers(1, 255)
# Places near the edges of pages and chunks find more than places anywhere.
PLACES = st.one_of(
    st.integers(0, BLOCKS_MAX),
    st.sampled_from([0, 7, 8, 9, 2047, 2048, 2049, 4095, 4096, 6143, 6144]),
)
COUNTS = st.one_of(st.integers(1, 20), st.sampled_from([2048, 2049, 4096, BLOCKS_MAX]))


class DiskModel(RuleBasedStateMachine):
    """What each block may hold: one content, or either of two after a trim."""

    def __init__(self) -> None:
        super().__init__()
        self.reactor = Reactor()
        self.disk = self.open(4097 * BLOCK)
        self.blocks: list[tuple[bytes, ...]] = [(bytes(BLOCK),)] * 4097
        self.pump = self.serve()
        self.cookie = 0

    @abstractmethod
    def open(self, size: int) -> Disk: ...

    def serve(self) -> Pump:
        disk = self.disk
        pump = Pump(disk=disk, export=Export("disk", "", disk.size, BLOCK, EVERYTHING))
        pump.channel = pump.connection._channel = open_channel(disk, pump.reactor)
        return pump

    def release(self) -> None:
        self.pump.__exit__()
        self.disk.close()

    def teardown(self) -> None:
        self.release()
        self.reactor.close()

    def do(
        self, command: int, place: int, count: int, flags: int = 0, payload: bytes = b""
    ) -> bytes:
        self.cookie += 1
        length = 0 if payload else count * BLOCK
        data = request(
            command, place * BLOCK, length, cookie=self.cookie, flags=flags, payload=payload
        )
        self.pump.send(data)
        stream = self.pump.receive(16 + (length if command == READ else 0))
        ((cookie, error, data),) = replies(stream, {self.cookie: length if command == READ else 0})
        assert (cookie, error) == (self.cookie, 0)
        return data

    def within(self, place: int, count: int) -> tuple[int, int]:
        place %= len(self.blocks)
        return place, min(count, len(self.blocks) - place)

    @rule(place=PLACES, count=COUNTS, fill=FILLS, flags=FLAGS)
    def write(self, place: int, count: int, fill: int, flags: int) -> None:
        place, count = self.within(place, count)
        content = bytes([fill]) * BLOCK
        self.do(WRITE, place, count, flags, content * count)
        self.blocks[place : place + count] = [(content,)] * count

    @rule(place=PLACES, count=COUNTS, flags=st.sampled_from([0, FUA, NO_HOLE, FUA | NO_HOLE]))
    def write_zeroes(self, place: int, count: int, flags: int) -> None:
        place, count = self.within(place, count)
        self.do(ZEROES, place, count, flags)
        self.blocks[place : place + count] = [(bytes(BLOCK),)] * count

    @rule(place=PLACES, count=COUNTS, flags=FLAGS)
    def trim(self, place: int, count: int, flags: int) -> None:
        place, count = self.within(place, count)
        self.do(TRIM, place, count, flags)
        for i in range(place, place + count):
            self.blocks[i] = (*self.blocks[i], bytes(BLOCK))

    @rule(place=PLACES, count=COUNTS)
    def read(self, place: int, count: int) -> None:
        place, count = self.within(place, count)
        data = self.do(READ, place, count)
        for i in range(count):
            content = data[i * BLOCK : (i + 1) * BLOCK]
            assert content in self.blocks[place + i], f"block {place + i}"
            self.blocks[place + i] = (content,)

    @rule()
    def flush(self) -> None:
        self.do(FLUSH, 0, 0)

    @invariant()
    def is_alive(self) -> None:
        assert not self.pump.closed
        assert self.pump.connection.counters.errors == 0


class MemoryDisk(DiskModel):
    """A malloc disk, which is also resized, and opened again as by the next worker."""

    INSTANCE = f"model-{os.getpid()}"

    def open(self, size: int) -> Disk:
        return BACKEND.create(
            "disk",
            {"size": size},
            instance=self.INSTANCE,
            reactor=self.reactor,
            block_size=BLOCK,
            readonly=False,
            shared=False,
        )

    def teardown(self) -> None:
        super().teardown()
        BACKEND.discard("disk", self.INSTANCE)

    @rule()
    def open_again(self) -> None:
        size = self.disk.size
        self.release()
        self.disk = self.open(size)
        self.pump = self.serve()

    @rule(count=st.integers(1, BLOCKS_MAX))
    def resize(self, count: int) -> None:
        self.disk.resize(count * BLOCK)
        self.pump.export.size = count * BLOCK
        new = [(bytes(BLOCK),)] * max(0, count - len(self.blocks))
        self.blocks = self.blocks[:count] + new


class PlainDisk(DiskModel):
    """A disk whose zeroes and FUA are emulated."""

    def open(self, size: int) -> Disk:
        return BareDisk(size)


class PendingChannel(HeldChannel):
    """Does the work of a `BareChannel` when the test finishes a request, in any order."""

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        # What is valid only now is copied, as every channel of its kind must.
        *head, payload = request
        kept = None if payload is None else memoryview(bytes(payload))
        return super().submit((*head, kept), owner)  # type: ignore[arg-type]

    def do_one(self, index: int) -> None:
        request, owner = self.pending[index % len(self.pending)]
        done = BareChannel(self.disk).submit(request, owner)
        assert done is not None
        self.finish(index % (len(self.pending)), data=bytes(done))
        self.room()


class PendingDisk(PlainDisk):
    """The same over a channel that completes later and is often busy."""

    def serve(self) -> Pump:
        pump = super().serve()
        self.base = PendingChannel(self.disk, 1)
        pump.connection._channel.base = self.base  # type: ignore[attr-defined]
        turn = pump.reactor.turn

        def turn_and_finish() -> bool:
            if self.base.pending:
                self.base.do_one(self.cookie)
            return turn()

        pump.reactor.turn = turn_and_finish  # type: ignore[method-assign]
        return pump

    @precondition(lambda self: len(self.blocks) > 40)
    @rule(fill=FILLS)
    def write_many_at_once(self, fill: int) -> None:
        """Fill the channel, so that it says busy."""
        stream = b""
        for i in range(40):
            content = bytes([(fill + i) & 0xFF]) * BLOCK
            stream += request(WRITE, i * BLOCK, cookie=i, payload=content, flags=i & FUA)
            self.blocks[i] = (content,)
        self.pump.send(stream)
        answers = replies(self.pump.receive(40 * 16), {})
        assert sorted(answers) == [(i, 0, b"") for i in range(40)]


TestMemoryDisk = MemoryDisk.TestCase
TestPlainDisk = PlainDisk.TestCase
TestPendingDisk = PendingDisk.TestCase
for _case in (TestMemoryDisk, TestPlainDisk, TestPendingDisk):
    _case.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)

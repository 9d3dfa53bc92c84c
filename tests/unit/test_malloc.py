"""Memory disks: what they keep, what they give back, and /dev/shm when it is full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from backends import registry
from backends.api import Disk
from backends.malloc import BACKEND, SIZE_MAX, MallocDisk
from backends.sharedmemory import CHUNK, DIRECTORY, PAGE, shared_memory
from backends.turns import TURN_BYTES
from reactor.errors import reason
from reactor.loop import Reactor
from reactor.protocol.export import Export
from tests.unit.pumping import Pump
from tests.unit.requests import replies, request

READ, WRITE, _, FLUSH, TRIM, CACHE, ZEROES = range(7)
NO_HOLE = 2
INSTANCE = f"test-{os.getpid()}"
#: Gives memory back though all of the process is locked.
LOCKED = """\
import sys
from backends.malloc import BACKEND
from reactor import pressure
from reactor.loop import Reactor

reactor = Reactor("poll")
pressure.lock_memory()
disk = BACKEND.create("locked", {"size": 4 << 20}, instance=sys.argv[1], reactor=reactor,
                      block_size=512, readonly=False, shared=False)
memory = disk.memory
memory.back(0, 2 << 20)
memory.data[:2 << 20] = bytes([1]) * (2 << 20)
memory.zero(4096, 1 << 20)
assert not any(memory.read(4096, (1 << 20) - 4096))
assert memory.read(1 << 20, 1) == b"\\1" == memory.read(4095, 1)
disk.resize(1 << 20)
disk.resize(2 << 20)
assert not any(memory.read(1 << 20, 1 << 20))
disk.close()
BACKEND.discard("locked", sys.argv[1])
reactor.close()
"""
ROOT = Path(__file__).parents[2]

Open = Callable[..., MallocDisk]


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor("poll")
    yield made
    made.close()


@pytest.fixture
def disk(reactor: Reactor) -> Iterator[Open]:
    opened: list[Disk] = []
    names: set[str] = set()

    def create(
        size: int = 4 << 20, name: str = "disk", block_size: int = 512, *, shared: bool = False
    ) -> MallocDisk:
        names.add(name)
        made = BACKEND.create(
            name,
            {"size": size},
            instance=INSTANCE,
            reactor=reactor,
            block_size=block_size,
            readonly=False,
            shared=shared,
        )
        opened.append(made)
        assert isinstance(made, MallocDisk)
        return made

    yield create
    for made in opened:
        close(made)
    for name in names:
        shared_memory(name, INSTANCE).unlink(missing_ok=True)
    assert not list(DIRECTORY.glob(f"nbd-reactor-{INSTANCE}-*"))


def close(disk: Disk) -> None:
    try:
        disk.close()
    except (AttributeError, OSError):  # the test closed it
        return


def serving(disk: Disk, flags: int = 1 | 4 | 8 | 32 | 64 | 1024) -> Pump:
    pump = Pump(disk=disk, export=Export("disk", "", disk.size, disk.block_size, flags))
    pump.channel = disk.channel(pump.reactor)
    return pump


class Access:
    """Reads and writes through a connection."""

    def __init__(self, pump: Pump) -> None:
        self.pump = pump

    def write(self, offset: int, data: bytes) -> int:
        return self.do(request(WRITE, offset, payload=data))

    def trim(self, offset: int, length: int) -> int:
        return self.do(request(TRIM, offset, length))

    def zero(self, offset: int, length: int, flags: int = 0) -> int:
        return self.do(request(ZEROES, offset, length, flags=flags))

    def do(self, stream: bytes) -> int:
        self.pump.send(stream)
        ((_, error, _),) = replies(self.pump.receive(16), {})
        return error

    def read(self, offset: int, length: int) -> bytes:
        self.pump.send(request(READ, offset, length))
        return self.pump.receive(16 + length)[16:]


def used(name: str = "disk") -> int:
    """Return the memory that a disk uses, without its header and map."""
    return shared_memory(name, INSTANCE).stat().st_blocks * 512 - 2 * PAGE


def test_it_is_found_by_its_name() -> None:
    assert registry.backend("malloc") is BACKEND


def test_a_new_disk_reads_zeroes_and_uses_no_memory(disk: Open) -> None:
    with serving(disk(64 << 20)) as pump:
        access = Access(pump)
        for offset in range(0, 64 << 20, 4 << 20):
            assert not any(access.read(offset, 1 << 20))
    assert used() == 0


def test_what_is_written_is_read(disk: Open) -> None:
    with serving(disk()) as pump:
        access = Access(pump)
        access.write(512, b"a" * 512)
        access.write(CHUNK - 512, b"b" * 1024)  # across chunks
        access.write(2 * CHUNK, b"c" * (2 * CHUNK))
        assert access.read(0, 2048) == bytes(512) + b"a" * 512 + bytes(1024)
        assert access.read(CHUNK - 1024, 2048) == bytes(512) + b"b" * 1024 + bytes(512)
        assert access.read(2 * CHUNK, 2 * CHUNK) == b"c" * (2 * CHUNK)


def test_a_trim_gives_the_memory_back_and_reads_zeroes(disk: Open) -> None:
    with serving(disk(8 << 20)) as pump:
        access = Access(pump)
        access.write(0, b"x" * (8 << 20))
        assert used() == 8 << 20
        access.trim(512, (4 << 20) - 512)
        assert used() <= (4 << 20) + PAGE
        assert access.read(PAGE, (4 << 20) - PAGE) == bytes((4 << 20) - PAGE)
        assert used() <= (4 << 20) + PAGE, "reading took memory"
        assert access.read(0, 512) == b"x" * 512
        assert access.read(4 << 20, 4 << 20) == b"x" * (4 << 20)


def test_a_trim_within_a_page_leaves_its_neighbours(disk: Open) -> None:
    with serving(disk()) as pump:
        access = Access(pump)
        access.write(0, b"x" * 4096)
        assert access.trim(512, 512) == 0
        assert access.read(0, 512) == b"x" * 512
        assert access.read(1024, 3072) == b"x" * 3072


@pytest.mark.parametrize("flags", [0, NO_HOLE])
@pytest.mark.parametrize(
    ("offset", "length"),
    [(512, 512), (512, 8192), (4096, 8192), (4096, 4096 - 512), (CHUNK - 512, CHUNK + 1024)],
)
def test_zeroes_are_exact(disk: Open, offset: int, length: int, flags: int) -> None:
    size = 4 << 20
    with serving(disk(size)) as pump:
        access = Access(pump)
        access.write(0, b"x" * size)
        assert access.zero(offset, length, flags) == 0
        expected = b"x" * offset + bytes(length) + b"x" * (size - offset - length)
        assert access.read(0, size) == expected


def test_zeroes_give_memory_back_unless_they_must_not(disk: Open) -> None:
    with serving(disk(4 << 20)) as pump:
        access = Access(pump)
        access.write(0, b"x" * (4 << 20))
        access.zero(0, 2 << 20, NO_HOLE)
        assert used() == 4 << 20
        access.zero(0, 2 << 20)
        assert used() == 2 << 20
        access.zero(0, 1 << 20, NO_HOLE)
        assert used() == 3 << 20


@pytest.mark.parametrize(("command", "flags"), [(TRIM, 0), (ZEROES, 0), (ZEROES, NO_HOLE)])
def test_a_long_clearing_leaves_turns_to_others(disk: Open, command: int, flags: int) -> None:
    size = 4 * TURN_BYTES
    with serving(disk(size)) as pump:
        access = Access(pump)
        access.write(0, b"x" * 4096)
        access.write(size - 4096, b"x" * 4096)
        pump.send(
            request(command, 0, size - 512, cookie=1, flags=flags)
            + request(command, 0, size - 512, cookie=2, flags=flags)
            + request(READ, size - 512, 512, cookie=3)
        )
        answers = replies(pump.receive(3 * 16 + 512), {3: 512})
        assert answers == [(3, 0, b"x" * 512), (1, 0, b""), (2, 0, b"")]
        assert access.read(0, 4096) == bytes(4096)
        cleared = access.read(size - 4096, 4096 - 512)
        assert not any(cleared) or command == TRIM, "only a trim may be rounded to pages"


@pytest.mark.parametrize("length", [64 << 10, 1 << 20, 2 * TURN_BYTES])
def test_a_flood_of_zeroes_comes_in_bounded_turns(disk: Open, length: int) -> None:
    count = 40 * TURN_BYTES // length
    with serving(disk(4 * TURN_BYTES)) as pump:
        flood = b"".join(request(ZEROES, 0, length, cookie=i, flags=NO_HOLE) for i in range(count))
        pump.send(flood)
        done = 0
        for _ in range(5):
            pump.turns(1)
            before, done = done, done + len(pump.drain_client()) // 16
            # What a turn does at once, and in its step.
            assert (done - before) * length <= 3 * TURN_BYTES
        pump.receive((count - done) * 16)
        assert pump.connection.counters.zeroes == count


def test_what_a_client_that_left_has_queued_is_not_done(disk: Open) -> None:
    opened = disk(8 * TURN_BYTES)
    with serving(opened) as pump:
        access = Access(pump)
        access.write(7 * TURN_BYTES, b"x" * 4096)
        pump.send(request(ZEROES, 0, 8 * TURN_BYTES, cookie=1, flags=NO_HOLE) * 100)
        pump.turns(2)
        pump.connection.close("the test says so")
        pump.turns(2)
        assert pump.closed
        assert opened.memory.data[7 * TURN_BYTES : 7 * TURN_BYTES + 4096] == b"x" * 4096


def test_the_data_survive_the_worker(disk: Open) -> None:
    first = disk(8 << 20)
    with serving(first) as pump:
        access = Access(pump)
        access.write(CHUNK + 512, b"a" * 1024)
        access.write(5 * CHUNK, b"b" * 512)
        access.trim(5 * CHUNK + 4096, 4096)
    first.close()
    before = used()
    with serving(disk(8 << 20)) as pump:
        access = Access(pump)
        expected = bytearray(8 << 20)
        expected[CHUNK + 512 : CHUNK + 1536] = b"a" * 1024
        expected[5 * CHUNK : 5 * CHUNK + 512] = b"b" * 512
        assert access.read(0, 8 << 20) == expected
        assert used() == before, "reading took memory"
        access.write(0, b"c" * 512)
        assert access.read(0, 512) == b"c" * 512


def test_the_holes_are_known_again_after_reopening(disk: Open) -> None:
    first = disk(6 * CHUNK + 4096)
    first.memory.back(0, 2 * CHUNK)
    first.memory.data[0 : 2 * CHUNK] = b"x" * (2 * CHUNK)
    first.memory.data[5 * CHUNK : 5 * CHUNK] = b""
    first.memory.back(6 * CHUNK, 6 * CHUNK + 4096)
    first.memory.data[6 * CHUNK : 6 * CHUNK + 512] = b"y" * 512
    first.close()
    second = disk(6 * CHUNK + 4096)
    assert bytes(second.memory.backed) == b"\1\1\0\0\0\0\1"


def test_a_hole_of_one_page_in_each_chunk_is_known_again(disk: Open) -> None:
    first = disk(6 * CHUNK)
    first.memory.back(0, 6 * CHUNK)
    first.memory.data[:] = b"x" * (6 * CHUNK)
    for chunk in (1, 2, 4):
        first.memory.trim(chunk * CHUNK + PAGE, chunk * CHUNK + 2 * PAGE)
    first.close()
    assert bytes(disk(6 * CHUNK).memory.backed) == b"\1\0\0\1\0\1"


def test_a_disk_in_use_is_not_opened_again(disk: Open) -> None:
    disk()
    with pytest.raises(OSError, match="in use by another process") as raised:
        disk()
    assert raised.value.errno == errno.EBUSY


@pytest.mark.parametrize("size", [2 << 20, 8 << 20])
def test_a_disk_whose_worker_died_in_a_resize_grows_and_is_never_cut(disk: Open, size: int) -> None:
    first = disk(4 << 20)
    first.memory.back(0, 4 << 20)
    first.memory.data[: 4 << 20] = b"k" * (4 << 20)
    first.close()
    again = disk(size)
    assert again.size == max(size, 4 << 20)
    assert bytes(again.memory.data[: 4 << 20]) == b"k" * (4 << 20)
    assert not any(again.memory.read(4 << 20, again.size - (4 << 20)))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"garbage" * 1000, "is not a memory disk"),
        (b"x", "is not a memory disk"),
        (b"nbdshmem", "is not a memory disk"),
        (b"nbdshmem" + b"\xff" * 100, "is of version"),
        (b"nbdshmem\x01\0\0\0" + bytes(100), "is of version 1, not 3"),
        (b"nbdshmem\x03\0\0\0" + bytes(100), "belongs to another disk"),
    ],
)
def test_garbage_is_refused_and_kept(disk: Open, content: bytes, problem: str) -> None:
    path = shared_memory("disk", INSTANCE)
    path.write_bytes(content)
    with pytest.raises(OSError, match=problem) as raised:
        disk()
    assert str(path) in reason(raised.value)
    with suppress(OSError):
        BACKEND.discard("disk", INSTANCE)
    assert path.read_bytes() == content


def test_a_file_cut_short_is_refused(disk: Open) -> None:
    disk(4 << 20).close()
    os.truncate(shared_memory("disk", INSTANCE), 8192)
    with pytest.raises(OSError, match="is cut short"):
        disk(4 << 20)


def test_what_was_left_half_made_is_made_anew(disk: Open) -> None:
    path = shared_memory("disk", INSTANCE)
    path.touch(0o600)
    os.truncate(path, 12345)
    assert disk(4 << 20).size == 4 << 20


def test_a_link_in_its_place_is_not_followed(disk: Open, tmp_path: Path) -> None:
    shared_memory("disk", INSTANCE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        disk()
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_another_users_file_is_refused(disk: Open) -> None:
    path = shared_memory("disk", INSTANCE)
    path.touch(0o666)
    os.chown(path, 65534, 65534)
    with pytest.raises(OSError, match="another user's"):
        disk()


def test_others_cannot_read_it(disk: Open) -> None:
    disk()
    assert shared_memory("disk", INSTANCE).stat().st_mode & 0o777 == 0o600


def test_any_name_stays_in_its_directory(disk: Open) -> None:
    for name in ("../../etc/passwd", "a/b", "ünï cödé", "."):
        disk(name=name)
        path = shared_memory(name, INSTANCE)
        assert path.parent == DIRECTORY
        assert path.exists()


def test_discard_of_what_is_not_there_is_harmless() -> None:
    BACKEND.discard("no such disk", INSTANCE)


@pytest.mark.parametrize("size", [0, -4096, 1000, SIZE_MAX + 512, 1 << 63])
def test_an_impossible_size_leaves_nothing_behind(disk: Open, size: int) -> None:
    with pytest.raises(OSError, match="bytes is"):
        disk(size)


def test_a_size_that_cannot_be_mapped_leaves_nothing_behind(disk: Open) -> None:
    disk(SIZE_MAX, name="disk0")
    with pytest.raises(OSError, match="Cannot allocate memory"):
        disk(SIZE_MAX, name="disk1")  # the address space has no room for a second one
    assert not shared_memory("disk1", INSTANCE).exists()


def test_a_size_beyond_the_maximum_is_told_before() -> None:
    assert BACKEND.check({"size": 1 << 30}, None) == []
    ((key, problem),) = BACKEND.check({"size": SIZE_MAX + 512}, None)
    assert key == "size"
    assert str(SIZE_MAX) in problem


# --- resize ---


@pytest.mark.parametrize("new", [5 << 20, (4 << 20) + 512, 64 << 20])
def test_a_disk_grows_with_zeroes(disk: Open, new: int) -> None:
    grown = disk(4 << 20)
    with serving(grown) as pump:
        access = Access(pump)
        access.write(0, b"x" * (4 << 20))
        grown.resize(new)
        pump.export.size = new
        assert access.read((4 << 20) - 512, 1024) == b"x" * 512 + bytes(512)
        assert access.write(new - 512, b"y" * 512) == 0
        assert access.read(new - 512, 512) == b"y" * 512
    grown.close()
    assert disk(new).size == new


@pytest.mark.parametrize("small", [512, CHUNK + 512, CHUNK, 3 << 20])
def test_a_disk_shrinks_gives_memory_back_and_grows_with_zeroes(disk: Open, small: int) -> None:
    size = 4 << 20
    shrunk = disk(size)
    with serving(shrunk) as pump:
        access = Access(pump)
        access.write(0, b"x" * size)
        shrunk.resize(small)
        pump.export.size = small
        assert used() <= small + 2 * PAGE
        assert access.read(0, 512) == b"x" * 512
        assert access.write(small, b"y" * 512) == errno.ENOSPC
        shrunk.resize(size)
        pump.export.size = size
        assert access.read(0, size) == b"x" * small + bytes(size - small)
        access.write(0, b"z" * size)
        assert access.read(0, size) == b"z" * size


def test_a_disk_shrinks_while_its_end_is_on_its_way_to_a_client(disk: Open) -> None:
    shrunk = disk(8 << 20)
    with serving(shrunk) as pump:
        access = Access(pump)
        access.write(0, b"x" * (8 << 20))
        pump.send(request(READ, 0, 8 << 20))
        pump.turns()
        for size in (4096, 16 << 20, 512):
            shrunk.resize(size)
        pump.export.size = 512
        data = pump.receive(16 + (8 << 20))[16:]
        assert set(data) <= {0, ord("x")}
        assert access.read(0, 512) == b"x" * 512


def test_a_disk_that_shrank_is_found_again(disk: Open) -> None:
    shrunk = disk(8 << 20)
    shrunk.resize(4 << 20)
    shrunk.close()
    found = disk(4 << 20)
    found.resize(8 << 20)
    assert not any(found.memory.read(0, 8 << 20))


@pytest.mark.parametrize("size", [0, 1000, SIZE_MAX * 2])
def test_an_impossible_new_size_changes_nothing(disk: Open, size: int) -> None:
    kept = disk(4 << 20)
    with pytest.raises(OSError, match="bytes is"):
        kept.resize(size)
    assert kept.size == 4 << 20


def test_memory_is_given_back_where_all_is_locked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, INSTANCE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")

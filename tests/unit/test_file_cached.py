"""What the file backend answers from the page cache, and what it does not do beside it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from backends.api import Busy, Channel
from backends.filechannel import POOLED_MIN
from backends.turns import SHARING, TURN_BYTES
from reactor.protocol.wire import NBD_CMD_FLAG_FUA, NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_WRITE
from tests.unit.file_disks import MIB, Client, Open, Opened, opening, uncache

#: The kernel may read ahead into what was just uncached, before it is looked at.
UNCACHED_TRIES = 20


@pytest.fixture
def opened() -> Iterator[Open]:
    yield from opening()


@pytest.fixture
def disk(tmp_path: Path, opened: Open) -> Opened:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return opened(path)


def test_large_reads_share_a_buffer_and_need_no_engine(disk: Opened) -> None:
    data = disk.path.read_bytes()
    for offset in range(0, MIB, POOLED_MIN):
        assert disk.requester.read(offset, POOLED_MIN) == data[offset : offset + POOLED_MIN]
    assert disk.channel._pool.total_bytes == disk.channel._pool.free_bytes == POOLED_MIN
    assert disk.channel._engine.number == 0


def test_what_large_reads_copy_in_a_turn_is_bounded(
    monkeypatch: pytest.MonkeyPatch, disk: Opened
) -> None:
    copied, preadv = 0, os.preadv

    def count(*arguments: Any) -> int:
        nonlocal copied
        length = preadv(*arguments)
        copied += length
        return length

    monkeypatch.setattr(os, "preadv", count)
    data = disk.path.read_bytes()
    clients = [Client(disk) for _ in range(8)]
    for client in clients:
        client.ask(*[(0, MIB)] * 8)
    while copied < 64 * MIB:
        before = copied
        disk.reactor.turn()
        # What was left of the last turn, all of this one, and with each a request that began.
        assert copied - before <= 2 * TURN_BYTES + 2 * MIB
        for client in clients:
            client.take()
    for client in clients:
        assert client.answers(8 * (16 + MIB))[16 : 16 + MIB] == data
        client.end()
    assert not SHARING


class Reader:
    """Reads the begin of a disk so many times, whenever the channel has room."""

    def __init__(self, channel: Channel, count: int, length: int) -> None:
        self.left = count
        self.done = 0
        self._channel = channel
        self._length = length

    def resume(self) -> None:
        with suppress(Busy):
            while self.left:
                read = (NBD_CMD_READ, 0, 0, 0, self._length, None)
                assert self._channel.submit(read, self) is None
                self.left -= 1

    def complete(self, *result: Any) -> None:
        _request, error, _data, buffer = result
        assert not error
        buffer.release()
        self.done += 1


def test_who_reads_much_and_who_reads_little_take_turns(disk: Opened) -> None:
    greedy, modest = Reader(disk.channel, 64, MIB), Reader(disk.channel, 8, POOLED_MIN)
    greedy.resume()
    modest.resume()
    assert (greedy.left, modest.left) == (60, 8)
    for _ in range(3):  # greedy's, modest's, and one in which that is answered
        disk.reactor.turn()
    assert modest.done == 8
    assert greedy.left >= 48
    while greedy.done < 64:
        disk.reactor.turn()


def test_what_is_not_cached_takes_no_room_of_the_turn(disk: Opened) -> None:
    for _ in range(UNCACHED_TRIES):
        uncache(disk.path)
        reader = Reader(disk.channel, 32, MIB)
        reader.resume()
        left = reader.left
        while reader.done < 32:
            disk.reactor.turn()
        if not left:
            return
    pytest.fail(f"{left} of 32 had to wait for room")


def test_a_disk_at_rest_keeps_no_buffers(disk: Opened) -> None:
    disk.requester.read(0, MIB)
    disk.channel.rest()
    assert disk.channel._pool.total_bytes == disk.channel._pool.free_bytes == 0
    assert disk.requester.read(0, MIB) == disk.path.read_bytes()


def test_small_reads_need_no_buffer(disk: Opened) -> None:
    disk.requester.read(0, POOLED_MIN - 512)
    assert disk.channel._pool.total_bytes == 0


def test_a_large_read_of_which_only_a_part_is_cached_is_whole(disk: Opened) -> None:
    data = disk.path.read_bytes()
    with disk.path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), MIB // 2, MIB // 2, os.POSIX_FADV_DONTNEED)
    assert disk.requester.read(0, MIB) == data
    assert disk.channel._pool.total_bytes == disk.channel._pool.free_bytes == MIB


@pytest.mark.parametrize("length", [512, POOLED_MIN])
@pytest.mark.parametrize("command", [NBD_CMD_READ, NBD_CMD_WRITE])
def test_a_failing_call_makes_the_file_suspect(
    monkeypatch: pytest.MonkeyPatch, disk: Opened, command: int, length: int
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "the medium fails")

    suspected: list[bool] = []
    monkeypatch.setattr(disk.disk, "suspect", lambda: suspected.append(True))
    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(os, "pwrite", fail)
    payload = bytes(length) if command == NBD_CMD_WRITE else b""
    assert disk.requester.do(command, 0, length, payload) == (errno.EIO, b"")
    assert suspected
    assert disk.channel._pool.total_bytes == disk.channel._pool.free_bytes


def test_a_write_to_a_part_of_a_page_that_is_not_cached_goes_to_the_engine(disk: Opened) -> None:
    data = bytearray(disk.path.read_bytes())
    operations = disk.channel._engine
    for offset, length in ((512, 512), (8192, 4608), (16384 + 512, 3584), (32768 + 512, 4096)):
        payload = os.urandom(length)
        for _ in range(UNCACHED_TRIES):
            uncache(disk.path)
            before = operations.number
            disk.requester.write(offset, payload)
            if operations.number == before + 1:
                break
        disk.requester.write(offset, payload)  # now it is cached
        assert operations.number == before + 1
        data[offset : offset + length] = payload
    assert disk.path.read_bytes() == data


def test_a_write_of_whole_pages_needs_no_engine(disk: Opened) -> None:
    disk.requester.write(4096, os.urandom(8192))
    assert disk.channel._engine.number == 0


def test_a_durable_write_keeps_the_error_of_earlier_ones_that_it_meets(
    monkeypatch: pytest.MonkeyPatch, disk: Opened
) -> None:
    """As of a thin pool that filled up behind the page cache: the kernel tells it only once."""
    engine, reactor = disk.channel._engine, disk.channel._reactor
    with monkeypatch.context() as patch:
        patch.setattr(
            type(engine),
            "datasync",
            lambda _, tag: reactor.call_later(0, lambda: tag[0](-errno.ENOSPC, tag)),
        )
        written = disk.requester.do(NBD_CMD_WRITE, 0, 4096, bytes(4096), flags=NBD_CMD_FLAG_FUA)
        assert written == (errno.ENOSPC, b"")
    for _ in range(2):
        assert disk.requester.do(NBD_CMD_FLUSH, 0, 0) == (errno.ENOSPC, b"")


def test_flushes_that_wait_for_a_running_one_fail_with_it(
    monkeypatch: pytest.MonkeyPatch, disk: Opened
) -> None:
    """The kernel tells the lost write once: a success of the next one would be a lie."""
    engine, reactor, results = disk.channel._engine, disk.channel._reactor, [0, -errno.EIO]
    monkeypatch.setattr(
        type(engine),
        "datasync",
        lambda _, tag: reactor.call_later(0, partial(tag[0], results.pop(), tag)),
    )
    early = disk.requester.submit(NBD_CMD_FLUSH)
    engine.rounds += 1  # as when it starts
    late = disk.requester.submit(NBD_CMD_FLUSH)
    disk.requester.wait()
    assert disk.requester.answers == {early: (errno.EIO, b""), late: (errno.EIO, b"")}
    assert results == [0]

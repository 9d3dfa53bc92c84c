"""Disks that several workers have open: who may, who may not, and what they see of each other."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from backends import sharedmemory
from backends.linux import is_range_locked, lock_range, unlock_range
from backends.sharedmemory import CHUNK, DATA, PAGE, SharedMemory
from tests.unit.file_disks import MIB, Open, Opened, opening, problem

IN_USE = (errno.EBUSY, "is in use by another disk or service")
Kind = dict[str, Any]
NARROW: Kind = {}
READER: Kind = {"readonly": True}
SHARER: Kind = {"shared": True}
SHARING_READER: Kind = {"shared": True, "readonly": True}
OTHER_SHARER: Kind = {"shared": True, "name": "other"}


@pytest.fixture
def opened() -> Iterator[Open]:
    yield from opening()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


# --- files ---


def test_without_memory_for_its_lock_a_file_is_not_opened(
    image: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are no locks at all it is."""

    def refuse(number: int) -> None:
        def flock(_fd: int, _how: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOMEM)
    assert problem(opened, image) == (errno.ENOMEM, os.strerror(errno.ENOMEM))
    refuse(errno.ENOLCK)
    opened(image)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SHARER, SHARER),
        (READER, READER),
        (READER, SHARING_READER),
        (SHARING_READER, SHARING_READER),
    ],
)
def test_these_share_a_file(image: Path, opened: Open, first: Kind, second: Kind) -> None:
    opened(image, **first)
    opened(image, **second)
    opened(image, **first)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (NARROW, NARROW),
        (NARROW, SHARER),
        (NARROW, READER),
        (SHARER, NARROW),
        (SHARER, OTHER_SHARER),
        (SHARER, READER),
        (SHARER, SHARING_READER),
        (READER, SHARER),
        (READER, NARROW),
        (SHARING_READER, SHARER),
    ],
)
def test_these_exclude_each_other(image: Path, opened: Open, first: Kind, second: Kind) -> None:
    holder = Opened(image, **first)
    try:
        assert problem(opened, image, **second) == IN_USE
    finally:
        holder.close()
    opened(image, **second)


def test_a_shared_file_is_free_when_the_last_worker_has_left(image: Path, opened: Open) -> None:
    first, second = Opened(image, shared=True), Opened(image, shared=True)
    first.close()
    assert problem(opened, image) == IN_USE
    second.close()
    opened(image)


def test_a_shared_file_is_locked_for_other_programs(image: Path, opened: Open) -> None:
    opened(image, shared=True)
    with image.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_one_writes_and_the_other_reads(image: Path, opened: Open) -> None:
    first, second = opened(image, shared=True), opened(image, shared=True)
    first.requester.write(4096, b"f" * 4096)
    assert second.requester.read(4096, 4096) == b"f" * 4096


def test_a_worker_that_follows_a_smaller_size_does_not_think_the_file_is_lost(
    image: Path, opened: Open
) -> None:
    leader, follower = opened(image, shared=True), opened(image, shared=True)
    follower.disk.follow(4096)
    leader.disk.resize(4096)
    assert image.stat().st_size == 4096
    follower.disk.suspect()
    follower.reactor.turn()
    follower.reactor.turn()
    assert not follower.events
    leader.disk.resize(2 * MIB)
    follower.disk.follow(2 * MIB)
    assert follower.requester.read(MIB, MIB) == bytes(MIB)


# --- memory ---


class Workers:
    """The memory of one disk, open as often as there are workers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.open: list[SharedMemory] = []

    def add(self, size: int = 4 * CHUNK, *, shared: bool = True) -> SharedMemory:
        self.open.append(SharedMemory(self.path, b"disk", size, shared=shared))
        return self.open[-1]

    def used(self) -> int:
        return self.path.stat().st_blocks * 512 - 2 * PAGE


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[Workers]:
    path = sharedmemory.shared_memory("sharing", f"test-{os.getpid()}")
    made = Workers(path)
    yield made
    for memory in made.open:
        with suppress(AttributeError, OSError):  # the test closed it
            memory.close()
    path.unlink()


@pytest.mark.parametrize(("first", "second"), [(False, True), (True, False), (False, False)])
def test_shared_and_other_opens_of_memory_exclude_each_other(
    workers: Workers, first: bool, second: bool
) -> None:
    workers.add(shared=first)
    with pytest.raises(OSError, match="in use by another process") as raised:
        workers.add(shared=second)
    assert raised.value.errno == errno.EBUSY


def test_all_see_what_one_backs_and_trims(workers: Workers) -> None:
    first, second = workers.add(), workers.add()
    first.back(0, 2 * CHUNK)
    first.data[CHUNK : CHUNK + 4096] = b"f" * 4096
    assert bytes(second.backed) == b"\1\1\0\0"
    assert second.data[CHUNK : CHUNK + 4096] == b"f" * 4096
    assert second.trim(CHUNK, CHUNK + 4096)
    assert bytes(first.backed) == b"\1\0\0\0"
    assert not first.is_backed(0, 2 * CHUNK)
    assert first.is_backed(0, CHUNK)
    assert first.read(CHUNK, 4096) == bytes(4096)


def test_what_is_backed_amid_a_trim_is_not_marked(workers: Workers) -> None:
    memory, other = workers.add(), workers.add()
    with workers.path.open("r+b") as trimming:
        assert lock_range(trimming.fileno(), fcntl.F_RDLCK, DATA + CHUNK, CHUNK)
        memory.back(0, 4 * CHUNK)
        assert bytes(other.backed) == bytes(4)
        assert workers.used() == 4 * CHUNK
        memory.back(0, CHUNK)
        assert bytes(other.backed) == b"\1\0\0\0"
    memory.back(0, 4 * CHUNK)
    assert bytes(other.backed) == b"\1\1\1\1"


def test_nothing_is_trimmed_where_memory_is_given_and_zeroes_are_written(workers: Workers) -> None:
    memory = workers.add()
    memory.back(0, 4 * CHUNK)
    memory.data[:] = b"x" * (4 * CHUNK)
    with workers.path.open("r+b") as backing:
        assert lock_range(backing.fileno(), fcntl.F_WRLCK, DATA + CHUNK, CHUNK)
        assert not memory.trim(0, 4 * CHUNK)
        assert memory.data[:] == b"x" * (4 * CHUNK)
        memory.zero(512, 4 * CHUNK - 512)
        assert memory.read(512, 4 * CHUNK - 1024) == bytes(4 * CHUNK - 1024)
        assert memory.read(0, 512) == memory.read(4 * CHUNK - 512, 512) == b"x" * 512
        assert bytes(memory.backed) == b"\0\1\0\0"
        assert workers.used() == CHUNK + 2 * PAGE


def test_trims_do_not_hinder_each_other(workers: Workers) -> None:
    memory = workers.add()
    with workers.path.open("rb") as trimming:
        assert lock_range(trimming.fileno(), fcntl.F_RDLCK, DATA, 4 * CHUNK)
        assert memory.trim(0, CHUNK)


def test_the_size_of_one_is_followed_by_the_others(workers: Workers) -> None:
    leader, follower = workers.add(), workers.add()
    leader.back(0, 4 * CHUNK)
    leader.data[:] = b"x" * (4 * CHUNK)
    follower.map(CHUNK + 512)
    leader.resize(CHUNK + 512)
    assert len(follower.data) == CHUNK + 512
    assert bytes(follower.backed) == b"\1\0"
    follower.back(CHUNK, CHUNK + 512)  # all of the chunk, what a larger disk has of it too
    leader.resize(64 * CHUNK)
    follower.map(64 * CHUNK)
    assert bytes(follower.backed) == b"\1" + bytes(63)
    assert follower.read(0, CHUNK + 512) == b"x" * (CHUNK + 512)
    assert not any(follower.read(CHUNK + 512, 8 * CHUNK))


def test_a_worker_that_comes_later_finds_the_size_that_the_disk_has_by_then(
    workers: Workers,
) -> None:
    leader = workers.add()
    leader.resize(8 * CHUNK)
    assert len(workers.add(8 * CHUNK).data) == 8 * CHUNK
    assert len(leader.data) == 8 * CHUNK


# --- locks ---


def test_a_lock_belongs_to_an_open_and_not_to_a_process(image: Path) -> None:
    with image.open("r+b") as first, image.open("r+b") as second:
        assert lock_range(first.fileno(), fcntl.F_WRLCK, 1 << 62, 10)
        assert not is_range_locked(first.fileno(), 1 << 62, 10), "one's own does not count"
        assert is_range_locked(second.fileno(), (1 << 62) + 9, 1)
        assert not is_range_locked(second.fileno(), (1 << 62) + 10, 1)
        assert not lock_range(second.fileno(), fcntl.F_RDLCK, 1 << 62, 1)
        unlock_range(first.fileno(), 1 << 62, 10)
        assert lock_range(second.fileno(), fcntl.F_RDLCK, 1 << 62, 1)

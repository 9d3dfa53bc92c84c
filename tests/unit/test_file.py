"""The file backend on real files: buffered, direct, with io_uring and with threads."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backends.api import COOKIE
from backends.file import FileBackend
from backends.threads import Threads
from backends.uring import Ring
from reactor.loop import Reactor
from reactor.protocol.wire import (
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from tests.submitting import Requester, turn_until
from tests.unit.file_disks import MIB, Open, Opened, opening, problem, uncache


@pytest.fixture
def opened() -> Iterator[Open]:
    yield from opening()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB))
    return path


@pytest.fixture
def memory() -> Iterator[Path]:
    """Give a folder on a file system in memory."""
    folder = tempfile.mkdtemp(prefix="nbd-reactor-test-", dir="/dev/shm")
    yield Path(folder)
    shutil.rmtree(folder)


WAYS: dict[str, dict[str, Any]] = {
    "buffered": {"engine": Ring},
    "direct": {"engine": Ring, "direct": True},
    "buffered-threads": {"engine": Threads},
    "direct-threads": {"engine": Threads, "direct": True},
}


@pytest.fixture(params=WAYS)
def disk(request: pytest.FixtureRequest, image: Path, opened: Open) -> Opened:
    return opened(image, **WAYS[request.param])


@pytest.fixture(params=[Ring, Threads])
def engine(request: pytest.FixtureRequest) -> type[Ring] | type[Threads]:
    engine: type[Ring] | type[Threads] = request.param
    return engine


# --- input and output ---


def test_reads_what_the_file_holds(disk: Opened) -> None:
    content = disk.path.read_bytes()
    assert disk.requester.read(0, MIB) == content
    assert disk.requester.read(512, 1024) == content[512:1536]


def test_reads_from_the_page_cache_are_answered_at_once(image: Path, opened: Open) -> None:
    content = image.read_bytes()
    disk = opened(image)
    cookie = disk.requester.submit(NBD_CMD_READ, 4096, 8192)
    assert disk.requester.answers == {cookie: (0, content[4096:12288])}


def test_reads_that_miss_the_page_cache_are_pending(
    image: Path, opened: Open, engine: object
) -> None:
    content = image.read_bytes()
    disk = opened(image, engine=engine)
    uncache(image)
    disk.requester.submit(NBD_CMD_READ, 0, MIB)
    assert disk.requester.pending == 1
    disk.requester.wait()
    assert disk.requester.answers == {1: (0, content)}


def test_what_is_written_is_in_the_file(disk: Opened) -> None:
    disk.requester.write(4096, b"abcd" * 1024)
    disk.requester.write(512, b"e" * 512, NBD_CMD_FLAG_FUA)
    content = disk.path.read_bytes()
    assert content[4096:8192] == b"abcd" * 1024
    assert content[512:1024] == b"e" * 512


def test_a_payload_may_change_once_it_is_submitted(disk: Opened) -> None:
    payload = bytearray(b"x" * 4096)
    cookies = []
    for block in range(16):
        payload[:] = bytes([block]) * 4096
        cookies.append(disk.requester.submit(NBD_CMD_WRITE, block * 4096, payload=payload))
    disk.requester.wait()
    assert all(disk.requester.answers[cookie] == (0, b"") for cookie in cookies)
    for block in range(16):
        assert disk.requester.read(block * 4096, 4096) == bytes([block]) * 4096


def test_requests_of_32_mib(tmp_path: Path, opened: Open) -> None:
    for options in WAYS.values():
        disk = opened(tmp_path / f"{len(options)}", size=64 * MIB, **options)
        payload = os.urandom(32 * MIB)
        disk.requester.write(16 * MIB, payload)
        assert disk.requester.read(16 * MIB, 32 * MIB) == payload
        disk.close()
        disk.close = lambda: None  # type: ignore[method-assign]
        disk.path.unlink()


def test_more_requests_than_there_is_room_for_are_all_answered(disk: Opened) -> None:
    content = disk.path.read_bytes()
    for index in range(1000):
        disk.requester.submit(NBD_CMD_READ, index * 512, 4096)
    disk.requester.wait()
    assert len(disk.requester.answers) == 1000
    for cookie, answer in disk.requester.answers.items():
        assert answer == (0, content[(cookie - 1) * 512 :][:4096])


def test_room_comes_when_lent_buffers_are_given_back(tmp_path: Path, opened: Open) -> None:
    disk = opened(tmp_path / "large", size=128 * MIB, direct=True, keep_lent=True)
    requester = disk.requester
    for index in range(4):
        requester.submit(NBD_CMD_READ, index * 32 * MIB, 32 * MIB)
    turn_until(disk.reactor, lambda: len(requester.answers) == 2)
    assert requester.refusals
    requester.give_back()
    turn_until(disk.reactor, lambda: len(requester.answers) == 3)
    requester.give_back()
    turn_until(disk.reactor, lambda: len(requester.answers) == 4)
    requester.give_back()
    requester.give_back()


def test_a_large_request_is_not_overtaken_for_ever(tmp_path: Path, opened: Open) -> None:
    disk = opened(tmp_path / "large", size=64 * MIB, direct=True, keep_lent=True)
    small, large = disk.requester, Requester(disk.reactor, disk.channel)
    for index in range(60):
        small.submit(NBD_CMD_READ, index * MIB, MIB)
    turn_until(disk.reactor, lambda: len(small.answers) == 60)
    large.submit(NBD_CMD_READ, 0, 32 * MIB)
    assert large.refusals == 1
    for index in range(100):  # small requests go on coming, one for each that has ended
        small.submit(NBD_CMD_READ, index % 60 * MIB, MIB)
        if small.lent:
            small.give_back()
        disk.reactor.call_later(0, lambda: None)
        disk.reactor.turn()
    assert len(large.answers) == 1
    while small.lent:
        small.give_back()
    small.keep_lent = False
    small.wait()


def test_a_durable_write_past_the_page_cache_asks_the_kernel_for_it(
    monkeypatch: pytest.MonkeyPatch, image: Path, opened: Open, engine: type[Ring] | type[Threads]
) -> None:
    disk = opened(image, engine=engine, direct=True)
    write, asked = engine.write, []

    def noting(self: Any, *arguments: Any) -> None:
        asked.append(arguments[4])
        write(self, *arguments)

    monkeypatch.setattr(engine, "write", noting)
    for flags in (0, NBD_CMD_FLAG_FUA):
        assert disk.requester.do(NBD_CMD_WRITE, 0, 4096, bytes(4096), flags=flags) == (0, b"")
    assert asked == [0, os.RWF_DSYNC]


def test_flushes_of_one_turn_share_one_fdatasync(disk: Opened) -> None:
    disk.requester.write(0, b"x" * 4096)
    for _ in range(50):
        disk.requester.submit(NBD_CMD_FLUSH)
    assert disk.channel._engine.in_flight == 1
    disk.requester.wait()
    assert len(disk.requester.answers) == 51
    assert {error for error, _ in disk.requester.answers.values()} == {0}


def test_a_flush_that_comes_while_one_runs_gets_one_of_its_own(disk: Opened) -> None:
    disk.requester.write(0, b"x" * 4096)
    early = disk.requester.submit(NBD_CMD_FLUSH)
    disk.channel._engine.rounds += 1  # as when it starts; a real start may also be its end
    late = disk.requester.submit(NBD_CMD_FLUSH)
    running, waiting = disk.channel._syncing, disk.channel._next_sync
    assert [request[COOKIE] for request, _ in running] == [early]
    assert [request[COOKIE] for request, _ in waiting] == [late]
    disk.requester.wait()
    assert disk.requester.order[-2:] == [early, late]
    assert disk.requester.answers[late] == (0, b"")


def test_trims_give_the_blocks_back_and_read_as_zeroes(disk: Opened) -> None:
    os.sync()
    before = disk.path.stat().st_blocks
    assert disk.requester.do(NBD_CMD_TRIM, 65536, 131072) == (0, b"")
    assert disk.path.stat().st_blocks <= before - 131072 // 512
    assert disk.path.stat().st_size == MIB
    assert disk.requester.read(65536, 131072) == bytes(131072)


def test_zeroes_free_the_blocks_when_they_may(disk: Opened) -> None:
    before = disk.path.stat().st_blocks
    assert disk.requester.do(NBD_CMD_WRITE_ZEROES, 65536, 131072) == (0, b"")
    assert disk.path.stat().st_blocks <= before - 131072 // 512
    assert disk.requester.read(65536, 131072) == bytes(131072)


def test_zeroes_keep_the_blocks_when_no_hole_is_asked_for(disk: Opened) -> None:
    before = disk.path.stat().st_blocks
    flags = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FUA
    assert disk.requester.do(NBD_CMD_WRITE_ZEROES, 65536, 131072, flags=flags) == (0, b"")
    assert disk.path.stat().st_blocks >= before
    assert disk.requester.read(65536, 131072) == bytes(131072)


def test_caching_and_empty_requests_succeed(disk: Opened) -> None:
    for command in (NBD_CMD_CACHE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES, NBD_CMD_READ):
        assert disk.requester.do(command, 4096, 0) == (0, b"")
    assert disk.requester.do(NBD_CMD_WRITE, 4096) == (0, b"")
    assert disk.requester.do(NBD_CMD_CACHE, 0, MIB) == (0, b"")


def test_a_write_that_waits_sends_the_next_ones_to_the_engine(
    image: Path, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = opened(image)
    disk.requester.write(0, b"x" * 4096)
    assert disk.channel._engine.rounds == 0
    monkeypatch.setattr("backends.filechannel.STALL_NS", -4096)  # now every write waits
    disk.requester.write(0, b"y" * 4096)
    disk.requester.write(4096, b"z" * 4096)
    assert disk.channel._engine.rounds > 0
    assert image.read_bytes()[:8192] == b"y" * 4096 + b"z" * 4096


# --- file systems ---


def test_a_file_in_memory(memory: Path, opened: Open) -> None:
    disk = opened(memory / "file", size=MIB)
    assert disk.disk.can_trim
    assert disk.disk.can_write_zeroes
    disk.requester.write(4096, b"x" * 65536)
    assert disk.requester.read(4096, 65536) == b"x" * 65536
    assert disk.requester.do(NBD_CMD_TRIM, 8192, 4096) == (0, b"")
    assert disk.requester.read(8192, 4096) == bytes(4096)
    assert disk.requester.do(NBD_CMD_FLUSH) == (0, b"")


def test_zeroes_keep_memory_too_where_there_is_no_zero_range(memory: Path, opened: Open) -> None:
    disk = opened(memory / "file", size=MIB)
    disk.requester.write(0, b"x" * MIB)
    flags = NBD_CMD_FLAG_NO_HOLE
    assert disk.requester.do(NBD_CMD_WRITE_ZEROES, 0, 65536, flags=flags) == (0, b"")
    assert disk.requester.read(0, 65536) == bytes(65536)
    assert disk.path.stat().st_blocks == MIB // 512


# --- opening ---


def test_a_missing_file_is_named(tmp_path: Path, opened: Open) -> None:
    text = "no such file, and no size to create it"
    assert problem(opened, tmp_path / "no") == (errno.ENOENT, text)


def test_a_missing_file_is_not_made_for_reading(tmp_path: Path, opened: Open) -> None:
    text = "no such file, and the disk is read-only"
    assert problem(opened, tmp_path / "no", size=MIB, readonly=True) == (errno.ENOENT, text)
    assert not (tmp_path / "no").exists()


def test_a_missing_folder_is_an_error(tmp_path: Path, opened: Open) -> None:
    text = "No such file or directory"
    assert problem(opened, tmp_path / "no" / "file", size=MIB) == (errno.ENOENT, text)


def test_what_is_not_a_regular_file_is_refused(tmp_path: Path, opened: Open) -> None:
    text = "is a directory, not a regular file or block device"
    assert problem(opened, tmp_path) == (errno.EISDIR, text)
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    text = "is not a regular file or block device"
    for path in (tmp_path / "fifo", tmp_path / "socket", Path("/dev/null")):
        assert problem(opened, path) == (errno.EINVAL, text)


def test_an_empty_file_is_refused(tmp_path: Path, opened: Open) -> None:
    (tmp_path / "empty").touch()
    assert problem(opened, tmp_path / "empty") == (errno.EINVAL, "is empty")


def test_a_size_that_is_no_multiple_of_the_block_size_is_refused(
    tmp_path: Path, opened: Open
) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(4096 + 512))
    text = "its size 4608 is not a multiple of the block size 4096"
    assert problem(opened, path, block_size=4096) == (errno.EINVAL, text)
    path.write_bytes(bytes(1000))
    text = "its size 1000 is not a multiple of the block size 512"
    assert problem(opened, path) == (errno.EINVAL, text)


def test_size_creates_a_private_sparse_file(tmp_path: Path, opened: Open) -> None:
    disk = opened(tmp_path / "new", size=64 * MIB)
    status = disk.path.stat()
    assert (disk.disk.size, status.st_size, status.st_blocks) == (64 * MIB, 64 * MIB, 0)
    assert stat.S_IMODE(status.st_mode) == 0o600


def test_a_size_that_no_file_can_have_leaves_no_file(tmp_path: Path, opened: Open) -> None:
    size = (1 << 63) - 512
    text = f"cannot be {size} bytes large"
    assert problem(opened, tmp_path / "huge", size=size) == (errno.EFBIG, text)
    assert not (tmp_path / "huge").exists()


def test_size_grows_a_file_and_keeps_its_content(image: Path, opened: Open) -> None:
    content = image.read_bytes()
    disk = opened(image, size=2 * MIB)
    assert disk.disk.size == 2 * MIB
    assert image.read_bytes() == content + bytes(MIB)


def test_size_never_cuts_a_file(image: Path, opened: Open) -> None:
    assert opened(image, size=4096).disk.size == MIB
    assert image.stat().st_size == MIB


def test_a_read_only_file_is_not_grown(image: Path, opened: Open) -> None:
    text = f"is smaller than {2 * MIB} bytes, and the disk is read-only"
    assert problem(opened, image, size=2 * MIB, readonly=True) == (errno.EINVAL, text)


def test_one_writer_keeps_everybody_away(image: Path, opened: Open) -> None:
    opened(image)
    text = "is in use by another disk or service"
    assert problem(opened, image) == (errno.EBUSY, text)
    assert problem(opened, image, readonly=True) == (errno.EBUSY, text)


def test_readers_share_a_file_without_a_writer(image: Path, opened: Open) -> None:
    content = image.read_bytes()
    for _ in range(3):
        disk = opened(image, readonly=True)
        assert disk.requester.read(0, MIB) == content
    text = "is in use by another disk or service"
    assert problem(opened, image) == (errno.EBUSY, text)


def test_the_lock_ends_with_the_disk(image: Path, opened: Open) -> None:
    first = Opened(image)
    first.close()
    opened(image)


@pytest.mark.parametrize(
    ("options", "block_size", "problems"),
    [
        ({"path": "/x"}, None, []),
        ({"path": "/x", "size": 4096}, 4096, []),
        ({"path": "/x", "size": 0}, None, [("size", "must be more than 0")]),
        (
            {"path": "/x", "size": 1000},
            None,
            [("size", "1000 is not a multiple of the block size 512")],
        ),
        (
            {"path": "/x", "size": 512},
            4096,
            [("size", "512 is not a multiple of the block size 4096")],
        ),
    ],
)
def test_what_the_config_alone_tells(
    options: dict[str, object], block_size: int | None, problems: list[tuple[str, str]]
) -> None:
    assert FileBackend.check(options, block_size) == problems


# --- removal ---


def test_a_deleted_file_is_removed(image: Path, opened: Open) -> None:
    disk = opened(image)
    image.unlink()
    assert disk.removal() == f"{image} was deleted"


def test_a_replaced_file_is_removed(image: Path, opened: Open, tmp_path: Path) -> None:
    disk = opened(image)
    (tmp_path / "other").write_bytes(bytes(MIB))
    (tmp_path / "other").rename(image)
    assert disk.removal() == f"{image} was replaced"


def test_a_file_that_shrank_is_removed_at_the_first_short_read(disk: Opened) -> None:
    os.truncate(disk.path, 4096 + 100)
    assert disk.requester.do(NBD_CMD_READ, 4096, 4096) == (errno.EIO, b"")
    assert disk.requester.do(NBD_CMD_READ, 8192, 4096) == (errno.EIO, b"")
    assert disk.removal() == f"{disk.path} shrank from {MIB} to 4196 bytes"
    assert disk.reactor.clock() < disk.disk._watch_timer.deadline_ns


def test_growth_from_outside_is_ignored(disk: Opened) -> None:
    os.truncate(disk.path, 2 * MIB)
    disk.disk._look()
    assert disk.events == []
    assert disk.disk.size == MIB


def test_input_and_output_in_flight_end_when_the_file_goes(disk: Opened) -> None:
    for block in range(100):
        disk.requester.submit(NBD_CMD_READ, block * 4096, 4096)
        disk.requester.submit(NBD_CMD_WRITE, block * 4096, payload=b"x" * 4096)
    disk.path.unlink()
    disk.requester.submit(NBD_CMD_FLUSH)
    disk.requester.wait()
    assert len(disk.requester.answers) == 201
    disk.disk.suspect()
    assert disk.removal() == f"{disk.path} was deleted"


def test_a_closed_disk_is_not_watched_any_more(image: Path) -> None:
    disk = Opened(image)
    disk.disk.suspect()
    reactor = disk.reactor
    disk.reactor = Reactor()  # keep the disk's to turn it
    disk.close()
    image.unlink()
    for _ in range(3):
        reactor.call_later(0, lambda: None)
        reactor.turn()
    reactor.close()
    assert disk.events == []


# --- resize ---


def test_resize_changes_a_file(disk: Opened) -> None:
    disk.disk.resize(2 * MIB)
    assert disk.path.stat().st_size == disk.disk.size == 2 * MIB
    assert disk.requester.read(MIB, 4096) == bytes(4096)
    disk.disk.resize(MIB // 2)
    assert disk.path.stat().st_size == disk.disk.size == MIB // 2
    disk.disk._look()
    assert disk.events == []


def test_a_file_that_is_larger_by_now_is_not_cut_to_grow(disk: Opened) -> None:
    os.truncate(disk.path, 4 * MIB)
    with pytest.raises(OSError, match=f"has {4 * MIB} bytes by now, and is not cut"):
        disk.disk.resize(2 * MIB)
    assert disk.path.stat().st_size == 4 * MIB
    disk.disk.resize(4 * MIB)
    assert disk.disk.size == 4 * MIB


def test_a_read_only_disk_is_not_resized(image: Path, opened: Open) -> None:
    disk = opened(image, readonly=True)
    with pytest.raises(PermissionError, match="read-only"):
        disk.disk.resize(2 * MIB)
    assert image.stat().st_size == disk.disk.size == MIB

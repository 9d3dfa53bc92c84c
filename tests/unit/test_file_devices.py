"""The file backend on block devices and full file systems, which take root to make."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.engine import ENTRIES
from reactor.protocol.wire import (
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from tests.mounting import mounted, mounted_new
from tests.submitting import turn_until
from tests.unit.file_disks import MIB, Open, Opened, opening, problem

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for losetup and mount"),
    pytest.mark.skipif(
        not Path("/dev/loop-control").exists(), reason="needs a kernel with loop devices"
    ),
]

Device = Callable[..., Path]


@pytest.fixture
def opened() -> Iterator[Open]:
    yield from opening()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB, in memory."""
    with mounted("none", tmp_path / "small", "-t", "tmpfs", "-o", "size=4m") as folder:
        yield folder


@pytest.fixture
def device(small: Path) -> Iterator[Device]:
    """Make block devices on files; torn down before `small`, on which they may stand."""
    devices: list[str] = []

    def attach(backing: Path, size: int, *options: str) -> Path:
        with backing.open("wb") as file:
            file.truncate(size)
        devices.append(run("losetup", "--find", "--show", *options, str(backing)))
        return Path(devices[-1])

    yield attach
    for name in devices:
        run("losetup", "--detach", name)


def is_claimed(path: Path) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("direct", [False, True])
def test_a_block_device_does_everything(
    tmp_path: Path, device: Device, opened: Open, *, direct: bool
) -> None:
    backing = tmp_path / "backing"
    disk = opened(device(backing, 16 * MIB), direct=direct)
    assert (disk.disk.size, disk.disk.block_size) == (16 * MIB, 512)
    assert disk.disk.can_trim
    assert disk.disk.can_write_zeroes
    payload = os.urandom(4 * MIB)
    disk.requester.write(MIB, payload)
    disk.requester.write(512, b"x" * 512, NBD_CMD_FLAG_FUA)
    assert disk.requester.do(NBD_CMD_FLUSH) == (0, b"")
    assert disk.requester.read(MIB, 4 * MIB) == payload
    assert backing.read_bytes()[MIB : 5 * MIB] == payload
    before = backing.stat().st_blocks
    flags = NBD_CMD_FLAG_FUA
    assert disk.requester.do(NBD_CMD_TRIM, MIB, MIB, flags=flags) == (0, b"")
    assert backing.stat().st_blocks <= before - MIB // 512
    assert disk.requester.read(MIB, MIB) == bytes(MIB)
    for flags in (0, NBD_CMD_FLAG_NO_HOLE):
        disk.requester.write(2 * MIB, payload[:MIB])
        assert disk.requester.do(NBD_CMD_WRITE_ZEROES, 2 * MIB, MIB, flags=flags) == (0, b"")
        assert disk.requester.read(2 * MIB, MIB) == bytes(MIB)


def test_trims_that_must_be_durable_may_end_while_everything_else_is_full(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    disk = opened(device(tmp_path / "backing", 16 * MIB))
    channel, ask = disk.channel, disk.requester.submit
    for _ in range(3):
        for index in range(4):
            ask(NBD_CMD_TRIM, index * MIB, MIB, flags=NBD_CMD_FLAG_FUA)
        channel._discards.kick()
        while len(channel._discards._results) < 4:
            time.sleep(0.001)
        for index in range(ENTRIES):
            ask(NBD_CMD_WRITE_ZEROES, 4096 * index, 4096)
        assert channel._engine.in_flight == channel._engine.depth
        disk.requester.wait()
    answers = disk.requester.answers
    assert list(answers.values()) == [(0, b"")] * len(answers)
    assert channel._engine.in_flight == 0


def test_the_logical_block_is_the_smallest(tmp_path: Path, device: Device, opened: Open) -> None:
    path = device(tmp_path / "backing", MIB, "--sector-size", "4096")
    text = "the block size 512 is below the 4096 that I/O here needs"
    assert problem(opened, path, block_size=512) == (errno.EINVAL, text)
    assert opened(path, direct=True).disk.block_size == 4096


def test_direct_blocks_follow_the_device_below_the_file_system(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", 16 * MIB, "--sector-size", "4096")
    with mounted_new(path, tmp_path / "mounted") as folder:
        disk = Opened(folder / "image", size=MIB, direct=True)
        assert disk.disk.block_size == 4096
        disk.requester.write(4096, b"x" * 4096)
        assert disk.requester.read(4096, 4096) == b"x" * 4096
        disk.close()
        text = "is mounted, or in use by another program"
        assert problem(opened, path) == (errno.EBUSY, text)
        assert opened(path, readonly=True).requester.do(NBD_CMD_READ, 0, 4096)[0] == 0


def test_a_claimed_device_is_refused_for_writing(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", MIB)
    opened(path)
    text = "is mounted, or in use by another program"
    assert problem(opened, path) == (errno.EBUSY, text)


def test_a_device_is_shared_by_the_workers_of_one_disk(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", MIB)
    taken = (errno.EBUSY, "is mounted, or in use by another program")
    holder = Opened(path, shared=True)
    opened(path, shared=True)
    assert problem(opened, path) == taken
    assert problem(opened, path, shared=True, name="other") == taken
    holder.close()
    opened(path, shared=True)  # it is the new holder
    assert problem(opened, path) == taken
    assert problem(opened, path, shared=True, name="other") == taken


def test_a_shared_device_is_claimed_by_another_worker_when_the_first_has_gone(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", MIB)
    first, second = Opened(path, shared=True), Opened(path, shared=True)
    third = opened(path, shared=True)
    first.close()
    assert not is_claimed(path)
    turn_until(second.reactor, lambda: is_claimed(path))
    second.close()
    turn_until(third.reactor, lambda: is_claimed(path))
    assert second.events == third.events == []


def test_a_shared_device_that_another_program_took_meanwhile_is_removed(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", MIB)
    holder = Opened(path, shared=True)
    others = [opened(path, shared=True) for _ in range(2)]
    holder.close()
    stranger = os.open(path, os.O_RDWR | os.O_EXCL)
    try:
        text = f"{path} was taken by another program when the worker that held it had died"
        assert [other.removal() for other in others] == [text, text]
        taken = (errno.EBUSY, "is mounted, or in use by another program")
        assert problem(opened, path, shared=True) == taken
    finally:
        os.close(stranger)


def test_a_worker_that_is_being_killed_is_no_other_program(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    # Its mark may end before its claim: seen once, that is not believed.
    path = device(tmp_path / "backing", MIB)
    holder = Opened(path, shared=True)
    other = opened(path, shared=True)
    holder.close()
    claim = os.open(path, os.O_RDONLY | os.O_EXCL)
    try:
        turn_until(other.reactor, lambda: other.disk._taken)
    finally:
        os.close(claim)
    turn_until(other.reactor, lambda: is_claimed(path))
    assert not other.events


def test_a_device_of_another_program_is_not_shared(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", MIB)
    opened(path)
    taken = (errno.EBUSY, "is mounted, or in use by another program")
    assert problem(opened, path, shared=True) == taken


def test_a_device_is_shown_whole_or_in_part(tmp_path: Path, device: Device, opened: Open) -> None:
    path = device(tmp_path / "backing", MIB)
    text = f"has only {MIB} bytes, not {2 * MIB}"
    assert problem(opened, path, size=2 * MIB) == (errno.ENOSPC, text)
    disk = opened(path, size=MIB // 2)
    assert disk.disk.size == MIB // 2
    disk.disk.resize(MIB)
    assert disk.requester.read(MIB // 2, 4096) == bytes(4096)
    with pytest.raises(OSError, match=f"the device has only {MIB} bytes"):
        disk.disk.resize(2 * MIB)
    assert disk.disk.size == MIB


def test_an_empty_device_is_refused_until_it_has_a_medium(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", 0)
    assert problem(opened, path) == (errno.EINVAL, "is empty")
    text = f"has only 0 bytes, not {MIB}"
    assert problem(opened, path, size=MIB) == (errno.ENOSPC, text)
    os.truncate(tmp_path / "backing", MIB)
    run("losetup", "--set-capacity", str(path))
    assert opened(path).disk.size == MIB


def test_a_device_that_grew_can_be_shown_whole(
    tmp_path: Path, device: Device, opened: Open
) -> None:
    path = device(tmp_path / "backing", MIB)
    disk = opened(path)
    os.truncate(tmp_path / "backing", 2 * MIB)
    run("losetup", "--set-capacity", str(path))
    disk.disk.resize(2 * MIB)
    assert disk.requester.read(MIB, MIB) == bytes(MIB)


def test_a_device_that_shrank_is_removed(tmp_path: Path, device: Device, opened: Open) -> None:
    path = device(tmp_path / "backing", MIB)
    disk = opened(path, direct=True)
    os.truncate(tmp_path / "backing", MIB // 2)
    run("losetup", "--set-capacity", str(path))
    assert disk.requester.do(NBD_CMD_READ, MIB // 2, 4096) == (errno.EIO, b"")
    assert disk.removal() == f"{path} shrank from {MIB} to {MIB // 2} bytes"


def test_a_full_file_system_is_told_as_it_is(small: Path, opened: Open) -> None:
    disk = opened(small / "thin", size=16 * MIB)
    errors = [disk.requester.do(NBD_CMD_WRITE, index * MIB, 0, b"x" * MIB)[0] for index in range(8)]
    assert errors == [0] * 4 + [errno.ENOSPC] * 4
    assert disk.requester.read(0, MIB) == b"x" * MIB
    assert disk.requester.do(NBD_CMD_TRIM, 0, 2 * MIB) == (0, b"")
    disk.requester.write(8 * MIB, b"y" * MIB)
    assert disk.events == []


def test_lost_data_fails_every_later_flush(
    small: Path, device: Device, opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    # The page cache takes what the loop device cannot store: its backing file has no room.
    disk = opened(device(small / "thin", 16 * MIB))
    for index in range(8):
        disk.requester.write(index * MIB, b"x" * MIB)
    with caplog.at_level(logging.ERROR):
        cookies = [disk.requester.submit(NBD_CMD_FLUSH) for _ in range(3)]
        disk.requester.wait()
    assert len({disk.requester.answers[cookie] for cookie in cookies}) == 1
    assert disk.requester.answers[cookies[0]][0] in (errno.EIO, errno.ENOSPC)
    assert len(caplog.records) == 1
    assert disk.requester.do(NBD_CMD_FLUSH)[0] == disk.requester.answers[cookies[0]][0]
    fua = disk.requester.do(NBD_CMD_WRITE, 0, 0, b"y" * 512, NBD_CMD_FLAG_FUA)
    assert fua == disk.requester.answers[cookies[0]]
    assert disk.requester.do(NBD_CMD_WRITE, 0, 0, b"y" * 512) == (0, b"")


def test_direct_writes_that_find_no_room_fail_themselves(
    small: Path, device: Device, opened: Open
) -> None:
    disk = opened(device(small / "thin", 16 * MIB), direct=True)
    errors = [disk.requester.do(NBD_CMD_WRITE, index * MIB, 0, b"x" * MIB)[0] for index in range(8)]
    assert errors[:3] == [0] * 3
    assert errors[-1] in (errno.EIO, errno.ENOSPC)
    assert disk.requester.do(NBD_CMD_FLUSH) == (0, b"")

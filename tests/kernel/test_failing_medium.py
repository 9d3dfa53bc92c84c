"""The medium below a file disk fails, wholly or in part, or is unplugged."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.client import Client
from tests.commands import attached, fio_verify, fio_verify_command, run
from tests.kernel.media import MIB, Medium, load_drivers, medium, needs_drivers
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, needs_drivers]
Start = Callable[..., RunningService]

BAD = 32 * MIB  # where the bad range begins, of 8 MiB


def config(tmp_path: Path, path: Path, *, direct: bool) -> str:
    return f"""
disks:
  disk: {{backend: file, path: {path}, direct: {str(direct).lower()}, device: /dev/nbd0,
         listen: 'unix:{tmp_path}/disk'}}
  other: {{backend: malloc, size: 8MiB, device: /dev/nbd1}}
"""


@pytest.fixture
def failing(tmp_path: Path) -> Iterator[Medium]:
    """Make a medium. To be asked for before `service`, which must end before it."""
    with medium("failing", tmp_path) as made:
        yield made


def fail_in_part(failing: Medium) -> None:
    end = BAD + 8 * MIB
    failing.become(failing.healthy(0, BAD), failing.failing(BAD, end), failing.healthy(end))


def error_of(function: Callable[..., object], *arguments: object, **keywords: object) -> int | None:
    with pytest.raises(OSError, match=r".") as raised:
        function(*arguments, **keywords)
    return raised.value.errno


def check_the_good_range(client: Client) -> None:
    for offset in (0, 48 * MIB):
        data = os.urandom(MIB)
        client.write(offset, data)
        assert client.read(offset, MIB) == data


def test_bad_blocks_under_direct_io_fail_alone(
    failing: Medium, service: Start, tmp_path: Path
) -> None:
    running = service(config(tmp_path, failing.path, direct=True))
    workers = running.workers()
    fail_in_part(failing)
    with Client(tmp_path / "disk", "disk") as client:
        assert error_of(client.read, BAD, 4096) == errno.EIO
        assert error_of(client.read, BAD - 4096, 8192) == errno.EIO
        assert error_of(client.write, BAD, b"x" * 4096) == errno.EIO
        assert error_of(client.write, BAD, b"x" * 4096, fua=True) == errno.EIO
        check_the_good_range(client)
        client.flush()
        dd = ("dd", "if=/dev/nbd0", "of=/dev/null", "bs=64k", f"skip={BAD >> 16}", "count=1")
        assert "Input/output error" in run(*dd, "iflag=direct", check=False)
        fio_verify("/dev/nbd0", "4M")
        failing.become(failing.healthy())
        client.write(BAD, b"x" * 4096, fua=True)
        assert client.read(BAD, 4096) == b"x" * 4096
    fio_verify("/dev/nbd0", "4M", offset=str(BAD))
    check_nobody_died(running, workers)


def test_bad_blocks_under_the_page_cache_fail_flushes_until_the_disk_starts_anew(
    failing: Medium, service: Start, tmp_path: Path
) -> None:
    running = service(config(tmp_path, failing.path, direct=False))
    workers = running.workers()
    fail_in_part(failing)
    with Client(tmp_path / "disk", "disk") as client:
        assert error_of(client.read, BAD, 4096) == errno.EIO
        check_the_good_range(client)
        client.flush()
        assert error_of(client.write, BAD, b"x" * 4096, fua=True) == errno.EIO
        check_the_good_range(client)
        failing.become(failing.healthy())
        # What the page cache has lost by now nobody knows: later success would be a lie.
        assert error_of(client.flush) == errno.EIO
        check_the_good_range(client)
        assert client.read(BAD + MIB, 4096) == bytes(4096)
    dd = ("dd", "if=/dev/zero", "of=/dev/nbd0", "bs=64k", "count=1", "conv=fsync")
    assert "Input/output error" in run(*dd, check=False)
    assert running.log.count("disk disk: data may be lost") == 1
    check_nobody_died(running, workers)
    running.rpc("reactor_stop_disk", name="disk")
    running.rpc("reactor_start_disk", name="disk")
    fio_verify("/dev/nbd0", "4M", offset=str(BAD))
    run("dd", "if=/dev/zero", "of=/dev/nbd0", "bs=64k", "count=1", "conv=fsync")
    check_nobody_died(running, workers)


@pytest.mark.parametrize("direct", [True, False])
def test_a_medium_of_which_nothing_is_left_fails_every_request_until_it_is_back(
    failing: Medium, service: Start, tmp_path: Path, *, direct: bool
) -> None:
    running = service(config(tmp_path, failing.path, direct=direct))
    workers = running.workers()
    failing.become(failing.failing())
    with Client(tmp_path / "disk", "disk") as client:
        assert error_of(client.read, MIB, 4096) == errno.EIO
        assert error_of(client.write, 0, b"x" * 4096, fua=True) == errno.EIO
        fio_verify("/dev/nbd1", "4M")
        failing.become(failing.healthy())
        check_the_good_range(client)
    assert running.await_state("disk", "online")["reason"] == ""
    check_nobody_died(running, workers)


@pytest.mark.parametrize("direct", [True, False])
def test_an_unplugged_device_is_removed(service: Start, tmp_path: Path, *, direct: bool) -> None:
    disks = set(Path("/sys/block").iterdir())
    load_drivers(tmp_path, "sd_mod", "scsi_debug dev_size_mb=64")
    try:
        (found,) = set(Path("/sys/block").iterdir()) - disks
        check_unplugging(service, tmp_path, found.name, direct=direct)
    finally:
        run("rmmod", "scsi_debug")


def check_unplugging(service: Start, tmp_path: Path, name: str, *, direct: bool) -> None:
    running = service(config(tmp_path, Path("/dev") / name, direct=direct))
    workers = running.workers()
    command = fio_verify_command("/dev/nbd0", "32M", time_based="1", runtime="200", verify="0")
    quiet = subprocess.DEVNULL
    fio = subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        disks = running.rpc
        running.await_true(
            lambda: disks("reactor_get_disks", name="disk")[0]["statistics"].get("writes", 0) > 0
        )
        Path(f"/sys/block/{name}/device/delete").write_text("1")
        assert fio.wait(60) != 0, "fio must be told that its device is gone"
    finally:
        fio.kill()
        fio.wait()
    reason = running.await_state("disk", "removed")["reason"]
    assert f"/dev/{name} is gone: the device was unplugged or removed" in reason
    assert not attached("/dev/nbd0")
    fio_verify("/dev/nbd1", "4M")
    check_nobody_died(running, workers)
    assert running.stop() == 0


def check_nobody_died(running: RunningService, workers: object) -> None:
    assert running.workers() == workers
    assert "Traceback" not in running.log

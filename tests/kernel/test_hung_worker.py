"""A worker that hangs with full sockets: what needs it goes on without it, all else is not held up.

The kernel's own DISCONNECT to a worker that does not read blocks for ever, and with it every other
netlink call on the host.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.commands import attached, ctl_command, endless_writes, fio_verify, in_flight, run
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(240)]
Start = Callable[..., RunningService]

MIB = 1 << 20
FAR = "far: {backend: malloc, size: 16MiB, device: /dev/nbd2"


def disks(folder: Path, attach: str) -> str:
    return f"""
disks:
  hung: {{backend: malloc, size: 64MiB, device: /dev/nbd0, attach: {attach}}}
  near: {{backend: file, path: {folder}/image, size: 32MiB, device: /dev/nbd1, attach: {attach}}}
"""


@pytest.fixture(params=["netlink", "ioctl"])
def running(request: pytest.FixtureRequest, service: Start, tmp_path: Path) -> RunningService:
    return service(disks(tmp_path, request.param))


@pytest.fixture
def other(service: Start) -> RunningService:
    """Another service: its worker is as well as its devices."""
    return service(f"disks:\n  {FAR}}}\n")


@contextmanager
def hung_worker(running: RunningService) -> Iterator[subprocess.Popen[bytes]]:
    """Stop the worker with more in flight than its socket holds; yields the fio that waits."""
    with endless_writes("/dev/nbd0", bsrange="128k-128k", iodepth="128") as fio:
        running.await_true(lambda: in_flight("/dev/nbd0") > 0)
        worker = running.workers()[running.rpc("reactor_get_disks", name="hung")[0]["core"]]
        worker.suspend()
        running.await_true(is_stuck)
        yield fio
        assert not lives(worker), "it was to be replaced"


def is_stuck() -> bool:
    """Whether no more fits in the socket: fio has 16 MiB to write, and none of it is sent."""
    before = in_flight("/dev/nbd0")
    time.sleep(0.5)
    return in_flight("/dev/nbd0") == before > 0


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def check_the_other_is_not_held_up(other: RunningService, waiting: subprocess.Popen[bytes]) -> None:
    """Read, resize (a netlink call), attach and detach there while `waiting` runs."""
    rounds = 0
    while waiting.poll() is None:
        run("dd", "if=/dev/nbd2", "of=/dev/null", "iflag=direct", "bs=4k", "count=4", seconds=60)
        other.rpc("reactor_resize_disk", name="far", size=(17 + rounds % 2) * MIB)
        other.rpc("bdev_malloc_create", name="new", num_blocks=2048, block_size=512)
        assert other.rpc("nbd_start_disk", bdev_name="new", nbd_device="/dev/nbd3") == "/dev/nbd3"
        assert other.rpc("nbd_stop_disk", nbd_device="/dev/nbd3") is True
        assert other.rpc("bdev_malloc_delete", name="new") is True
        rounds += waiting.poll() is None
    assert rounds, "all of it ended only when the wait was over"


@pytest.mark.parametrize("command", ["stop", "remove"])
def test_its_disk_is_let_go(running: RunningService, other: RunningService, command: str) -> None:
    with hung_worker(running) as fio:
        letting_go = subprocess.Popen(ctl_command(running.runtime_dir, command, "hung"))
        check_the_other_is_not_held_up(other, letting_go)
        assert letting_go.wait() == 0, running.log
        assert not attached("/dev/nbd0")
        assert fio.wait(60) != 0, "fio must be told that its device is gone"
    running.await_state("near", "online")
    fio_verify("/dev/nbd1", "4M")


@pytest.mark.smp
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["stop", "remove"])
def test_disks_of_other_workers_go_on(service: Start, tmp_path: Path, command: str) -> None:
    config = disks(tmp_path, "netlink, core: 1") + f"  {FAR}, core: 0}}\n"
    running = service(config, cores="0-1")
    with hung_worker(running) as fio:
        letting_go = subprocess.Popen(ctl_command(running.runtime_dir, command, "hung"))
        check_the_other_is_not_held_up(running, letting_go)
        assert letting_go.wait() == 0, running.log
        assert fio.wait(60) != 0
    running.await_state("near", "online")
    fio_verify("/dev/nbd1", "1M")
    fio_verify("/dev/nbd2", "1M")


def test_the_service_stops(running: RunningService, other: RunningService) -> None:
    with hung_worker(running) as fio:
        running.process.send_signal(signal.SIGTERM)
        check_the_other_is_not_held_up(other, running.process)
        assert running.stop() == 0, running.log
        assert not attached("/dev/nbd0")
        assert not attached("/dev/nbd1")
        fio.wait(60)


def test_the_service_stops_and_keeps_the_devices(
    service: Start, tmp_path: Path, other: RunningService
) -> None:
    config = disks(tmp_path, "netlink")
    running = service(config, "--on-exit", "keep")
    with hung_worker(running) as fio:
        running.process.send_signal(signal.SIGTERM)
        check_the_other_is_not_held_up(other, running.process)
        assert running.process.wait() == 0, running.log
        assert attached("/dev/nbd0")
        again = service(config, runtime_dir=running.runtime_dir)
        again.await_state("hung", "online")
        before = writes(again)
        again.await_true(lambda: writes(again) > before)
        assert fio.poll() is None, "no error"
    again.await_state("near", "online")
    fio_verify("/dev/nbd1", "4M")


def writes(running: RunningService) -> int:
    statistics = running.rpc("reactor_get_disks", name="hung")[0]["statistics"]
    return int(statistics.get("writes", 0))

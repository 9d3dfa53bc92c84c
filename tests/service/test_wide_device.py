"""A block device that several workers write to: what happens when its holder is killed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.client import Client
from tests.descriptors import open_files
from tests.running import RunningService

pytestmark = [
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for losetup"),
    pytest.mark.skipif(
        not Path("/dev/loop-control").exists(), reason="needs a kernel with loop devices"
    ),
]

Start = Callable[..., RunningService]


@pytest.fixture
def device(tmp_path: Path) -> Iterator[str]:
    with (tmp_path / "backing").open("wb") as file:
        file.truncate(1 << 20)
    command = ["losetup", "--find", "--show", str(tmp_path / "backing")]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    yield name
    # A service that still has it open closes it soon: the device then goes with the last open.
    subprocess.run(["losetup", "--detach", name], check=True)


@pytest.fixture
def running(device: str, service: Start, tmp_path: Path) -> RunningService:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))
    config = (
        f"disks:\n  w: {{backend: file, path: {device}, connections: 2,"
        f" listen: 'unix:{tmp_path}/w.sock'}}\n"
    )
    running = service(config, cores=cores)
    running.await_state("w", "online")
    return running


def opens(worker: psutil.Process, device: str) -> int:
    """Return how often a worker has the device open: who claims it, once more."""
    return open_files(worker.pid).count(device)


def holder_and_other(running: RunningService, device: str) -> tuple[psutil.Process, psutil.Process]:
    first, second = running.workers().values()
    assert {opens(first, device), opens(second, device)} == {1, 2}
    return (first, second) if opens(first, device) == 2 else (second, first)


def take(device: str) -> int | None:
    """Open the device as a mount or mkfs does; None when it is in use."""
    try:
        return os.open(device, os.O_RDWR | os.O_EXCL)
    except OSError:
        return None


def test_another_worker_takes_it_over(running: RunningService, device: str) -> None:
    holder, _ = holder_and_other(running, device)
    holder.kill()

    def is_whole_again() -> bool:
        workers = running.workers().values()
        if len(workers) < 2 or holder in workers:
            return False
        return sorted(opens(worker, device) for worker in workers) == [1, 2]

    running.await_true(is_whole_again)
    assert running.await_state("w", "online")["reason"] == ""
    assert take(device) is None


def test_nobody_writes_beside_who_took_it(
    running: RunningService, device: str, tmp_path: Path
) -> None:
    holder, other = holder_and_other(running, device)
    with Client(tmp_path / "w.sock", "w") as one, Client(tmp_path / "w.sock", "w") as two:
        other.send_signal(signal.SIGSTOP)  # it is not faster than we
        holder.kill()
        taken: list[int] = []
        running.await_true(lambda: taken.extend(filter(None, [take(device)])) or taken != [])
        other.send_signal(signal.SIGCONT)
        try:
            removed = running.await_state("w", "removed")
            assert "was taken by another program" in removed["reason"]
            for client in (one, two):
                with pytest.raises(OSError):  # noqa: PT011
                    client.write(0, bytes(512))
        finally:
            os.close(taken[0])

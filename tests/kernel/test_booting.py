"""No worker can boot: who uses a device waits. One that hangs before its hello is replaced."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.commands import attached, ctl_command, run
from tests.mounting import mounted_new
from tests.running import RunningService, copy_program

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(400)]
Start = Callable[..., RunningService]

SHORT_SECONDS = 6.0
DEATHS_MAX = 11  # after so many one is given up that had come up
CONFIG = "disks: {m: {backend: malloc, size: 16MiB, device: /dev/nbd0}}"
THREADS_MAX = Path("/proc/sys/kernel/threads-max")


def writing_to(mount: Path, name: object) -> subprocess.Popen[bytes]:
    write = ["dd", "if=/dev/urandom", f"of={mount}/{name}", "bs=64k", "count=16"]
    return subprocess.Popen([*write, "conv=fsync", "status=none"])


def test_a_mounted_file_system_waits_for_a_program_that_is_gone(
    service: Start, tmp_path: Path
) -> None:
    program = copy_program(tmp_path / "program")
    running = service(CONFIG, program=program)
    entry, away = program / "reactor/data/__main__.py", tmp_path / "away.py"
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount:
        entry.rename(away)
        running.workers()[0].kill()
        writing = writing_to(mount, "file")
        running.await_true(
            lambda: running.rpc("reactor_get_workers")[0]["restarts"] > DEATHS_MAX, 300
        )
        assert running.rpc("reactor_get_workers")[0]["state"] != "failed"
        assert writing.poll() is None
        away.rename(entry)
        running.await_state("m", "online")
        assert writing.wait(60) == 0, running.log
    run("fsck.ext4", "-fn", "/dev/nbd0")


@contextmanager
def few_threads(spare: int) -> Iterator[None]:
    """Let the host have so many threads more, and no others."""
    before = THREADS_MAX.read_text()
    there = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    THREADS_MAX.write_text(str(max(20, there + spare)))
    try:
        yield
    finally:
        THREADS_MAX.write_text(before)


def test_a_mounted_file_system_waits_for_threads(service: Start, tmp_path: Path) -> None:
    running = service(CONFIG)
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount:
        for spare in range(1, 5):
            worker = running.workers()[0]
            with few_threads(spare - worker.num_threads()):
                worker.kill()
                time.sleep(SHORT_SECONDS)
            running.await_state("m", "online")
            assert writing_to(mount, spare).wait(60) == 0, running.log
    run("fsck.ext4", "-fn", "/dev/nbd0")
    assert "there is no memory for a thread" in running.log
    assert "signal 6" not in running.log
    assert "Traceback" not in running.log


@pytest.fixture
def hung(service: Start) -> tuple[RunningService, psutil.Process]:
    """A service whose only worker was stopped before its hello, with writes that need it."""
    running = service(CONFIG)
    old = running.workers()[0]
    old.kill()
    worker = running.unborn_worker(old.pid)
    worker.suspend()
    return running, worker


def test_io_goes_on_past_a_worker_that_hangs_before_its_hello(
    hung: tuple[RunningService, psutil.Process],
) -> None:
    running, worker = hung
    data = os.urandom(1 << 20)
    write = ["dd", "of=/dev/nbd0", "bs=1M", "count=1", "oflag=direct", "status=none"]
    subprocess.run(write, input=data, check=True)
    assert not worker.is_running()
    assert "is killed" not in running.log, "it aborts at once"


def test_a_disk_stops_past_it(hung: tuple[RunningService, psutil.Process]) -> None:
    running, worker = hung
    assert subprocess.run(ctl_command(running.runtime_dir, "stop", "m"), check=True)
    assert not worker.is_running()
    assert not attached("/dev/nbd0")


def test_the_service_stops_past_it(hung: tuple[RunningService, psutil.Process]) -> None:
    running, _ = hung
    assert running.stop() == 0, running.log
    assert not attached("/dev/nbd0")

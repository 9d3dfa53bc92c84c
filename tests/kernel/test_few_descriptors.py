"""A controller that is short of descriptors knows nothing of its devices, and gives up none."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached, ctl_command, run
from tests.mounting import mounted_new
from tests.running import RunningService
from tests.shortages import few_descriptors

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(400)]
Start = Callable[..., RunningService]

SHORT_SECONDS = 4.0
START_SECONDS = 10.0
CONFIG = "disks: {m: {backend: malloc, size: 16MiB, device: /dev/nbd0}}"


@pytest.mark.parametrize("spares", [range(3), range(3, 6), range(6, 9)], ids=str)
def test_a_worker_dies_under_a_mounted_file_system(
    service: Start, tmp_path: Path, spares: range
) -> None:
    running = service(CONFIG)
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount:
        for spare in spares:
            (worker,) = running.workers().values()
            write = ["dd", "if=/dev/urandom", f"of={mount}/{spare}", "bs=64k", "count=16"]
            with few_descriptors(running.process.pid, spare):
                worker.kill()
                writing = subprocess.Popen([*write, "conv=fsync", "status=none"])
                time.sleep(SHORT_SECONDS)
            assert writing.wait(60) == 0, running.log
            running.await_state("m", "online")
            running.await_true(lambda: running.rpc("reactor_get_workers")[0]["pid"] is not None)
    run("fsck.ext4", "-fn", "/dev/nbd0")
    assert "failed" not in running.log
    assert "Traceback" not in running.log


def test_a_disk_grows(service: Start) -> None:
    running = service(CONFIG)
    (worker,) = running.workers().values()
    worker.suspend()
    running.config_path.write_text(CONFIG.replace("16MiB", "24MiB"))
    running.rpc("reactor_reload")
    with few_descriptors(running.process.pid, 0):
        worker.resume()
        time.sleep(SHORT_SECONDS)
    running.await_true(lambda: Path("/sys/block/nbd0/size").read_text() == f"{24 << 11}\n")
    assert running.await_state("m", "online")["size"] == 24 << 20
    assert "Traceback" not in running.log


def test_a_disk_is_stopped(service: Start) -> None:
    running = service(CONFIG)
    for spare in range(1, 7):  # the client that asks for it needs one
        data = os.urandom(1 << 20)
        with Path("/dev/nbd0").open("wb") as device:
            device.write(data)
            with few_descriptors(running.process.pid, spare):
                stopping = subprocess.Popen(ctl_command(running.runtime_dir, "stop", "m"))
                time.sleep(SHORT_SECONDS)
        assert stopping.wait(60) == 0, running.log
        assert not attached("/dev/nbd0"), running.log
        running.rpc("reactor_start_disk", name="m")
        running.await_state("m", "online")
    assert "may be lost" not in running.log
    assert "Traceback" not in running.log


def test_a_start_does_not_believe_that_the_kernel_holds_nothing(
    service: Start, tmp_path: Path
) -> None:
    running = service(CONFIG)
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount:
        (worker,) = running.workers().values()
        running.process.kill()
        running.process.wait()
        log = tmp_path / "log"
        command = [sys.executable, "-m", "reactor", "--runtime-dir", str(running.runtime_dir)]
        command += ["--cores", "0", "--config", str(running.config_path)]
        for limit in range(6, 24):
            with log.open("ab") as file:
                starting = subprocess.Popen(
                    ["prlimit", f"--nofile={limit}:{limit}", *command], stdout=file, stderr=file
                )
                try:
                    assert starting.wait(START_SECONDS) != 0, log.read_text()
                except subprocess.TimeoutExpired:  # it could start
                    break
                finally:
                    starting.kill()
                    starting.wait()
            assert attached("/dev/nbd0")
        assert worker.is_running()
        again = service(CONFIG, runtime_dir=running.runtime_dir)
        again.await_state("m", "online")
        (mount / "file").write_bytes(os.urandom(1 << 20))
        os.sync()
    assert "Too many open files" in log.read_text()
    assert "detached" not in log.read_text()
    run("fsck.ext4", "-fn", "/dev/nbd0")

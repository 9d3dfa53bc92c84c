"""A device does not answer: who waits for it in the kernel is in nobody's way, whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.commands import attached, ctl_command, fio_verify, run
from tests.deviceio import device_io, waits_for_device
from tests.mounting import mounted_new
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(240)]
Start = Callable[..., RunningService]

PF_MEMALLOC_NOIO = 0x80000  # include/linux/sched.h; what PR_SET_IO_FLUSHER sets
AT_ONCE = 5.0  # seconds: far less than dead_timeout
CONFIG = """
disks:
  waits: {backend: malloc, size: 8MiB, device: /dev/nbd0}
  mounted: {backend: malloc, size: 16MiB, device: /dev/nbd1}
"""


def process_of(running: RunningService) -> psutil.Process:
    process = device_io(running.process.pid)
    assert process is not None
    return process


def suspend_worker(running: RunningService) -> psutil.Process:
    (worker,) = running.workers().values()
    worker.suspend()
    return worker


@contextmanager
def writing_back(running: RunningService) -> Iterator[psutil.Process]:
    """Have the service wait for a write-back that nobody answers; yields what waits."""
    run("dd", "if=/dev/urandom", "of=/dev/nbd0", "bs=64k", "count=16")
    process = process_of(running)
    suspend_worker(running)
    with subprocess.Popen(
        ctl_command(running.runtime_dir, "stop", "waits"), stderr=subprocess.DEVNULL
    ) as stopping:
        running.await_true(lambda: waits_for_device(process.pid))
        yield process
        stopping.kill()


def kill_both(running: RunningService, worker: psutil.Process) -> None:
    running.process.kill()
    worker.kill()
    running.process.wait(AT_ONCE)


def test_a_controller_that_dies_with_its_worker_while_a_write_back_waits(
    service: Start, tmp_path: Path
) -> None:
    running = service(CONFIG)
    with mounted_new("/dev/nbd1", tmp_path / "mount") as mount:
        (worker,) = running.workers().values()
        with writing_back(running) as waiting:
            kill_both(running, worker)
            assert waits_for_device(waiting.pid), "it is left, and nobody's"
        again = service(CONFIG, runtime_dir=running.runtime_dir)
        again.await_state("mounted", "online")
        with (mount / "file").open("wb") as file:
            file.write(os.urandom(1 << 20))
            os.fsync(file.fileno())
        again.rpc("reactor_start_disk", name="waits")
        again.await_state("waits", "online")
        again.await_true(lambda: not psutil.pid_exists(waiting.pid))
    fio_verify("/dev/nbd0", "4M")


def test_a_controller_that_dies_with_its_worker_while_a_probe_waits(service: Start) -> None:
    running = service(CONFIG)
    (worker,) = running.workers().values()
    process = process_of(running)
    running.rpc("reactor_stop_disk", name="waits")
    process.suspend()  # only to hit the moment
    starting = ctl_command(running.runtime_dir, "start", "waits")
    with subprocess.Popen(starting, stderr=subprocess.DEVNULL):
        running.await_true(lambda: attached("/dev/nbd0"))
        worker.suspend()
        process.resume()
        running.await_true(lambda: waits_for_device(process.pid))
        kill_both(running, worker)
    assert waits_for_device(process.pid), "it is left, and nobody's"
    again = service(CONFIG, runtime_dir=running.runtime_dir)
    for name in ("waits", "mounted"):
        again.await_state(name, "online")
    again.await_true(lambda: not psutil.pid_exists(process.pid))
    for device in ("/dev/nbd0", "/dev/nbd1"):
        fio_verify(device, "4M")


def test_the_process_is_killed_while_it_waits(service: Start) -> None:
    running = service(CONFIG)
    (worker,) = running.workers().values()
    with writing_back(running) as waiting:
        waiting.kill()
        running.await_true(lambda: (device_io(running.process.pid) or waiting) != waiting)
        again = process_of(running)
        running.await_true(lambda: waits_for_device(again.pid))
        worker.resume()
        running.await_state("waits", "stopped")
    assert worker.is_running()
    assert "may be lost" not in running.log
    running.await_true(lambda: not psutil.pid_exists(waiting.pid))
    running.rpc("reactor_start_disk", name="waits")
    fio_verify("/dev/nbd0", "4M")


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1", "SIGKILL"])
def test_the_process_ends_with_its_controller(service: Start, number: str) -> None:
    running = service(CONFIG)
    process = process_of(running)
    running.process.send_signal(signal.Signals[number])
    running.process.wait()
    running.await_true(lambda: not psutil.pid_exists(process.pid))
    if number != "SIGTERM":
        service(CONFIG, runtime_dir=running.runtime_dir).await_state("waits", "online")


def test_it_is_kept_from_waiting_for_memory(service: Start) -> None:
    running = service(CONFIG, "--lock-memory")
    process = process_of(running)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert "VmLck:\t       0 kB" not in status
    assert os.sched_getscheduler(process.pid) == os.SCHED_RR
    assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "-900"
    flags = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[6]
    assert int(flags) & PF_MEMALLOC_NOIO


def test_a_reload_does_not_wait_for_one_that_hangs(service: Start) -> None:
    running = service(CONFIG)
    process = process_of(running)
    process.suspend()
    running.config_path.write_text(CONFIG.replace("MiB,", "MiB, dead_timeout: 60,"))
    answer = running.rpc_raw("reactor_reload")["error"]["message"]
    for name, device in (("waits", "/dev/nbd0"), ("mounted", "/dev/nbd1")):
        assert f"{name} stays as it was: it cannot be known whether {device} is in use" in answer
    assert "somebody" not in answer
    running.await_true(lambda: (device_io(running.process.pid) or process) != process)
    running.rpc("reactor_reload")
    for name in ("waits", "mounted"):
        running.await_true(lambda name=name: "dead_timeout" in config_of(running, name))
        running.await_state(name, "online")


def config_of(running: RunningService, name: str) -> str:
    return str(running.rpc("reactor_get_disks", name=name)[0]["config"])

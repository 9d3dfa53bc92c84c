"""The clock jumps: a day ahead, two back."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import fio_verify_command
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

DAY = 86400.0


@pytest.fixture
def jump() -> Iterator[Callable[[float], None]]:
    """Set the clock so many seconds ahead; it is right again at the end."""
    right = time.time() - time.monotonic()

    def ahead(seconds: float) -> None:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + seconds)

    yield ahead
    time.clock_settime(time.CLOCK_REALTIME, right + time.monotonic())


def test_io_goes_on_when_the_clock_jumps(
    service: Start, tmp_path: Path, jump: Callable[[float], None]
) -> None:
    running = service(f"""
disks:
  ram: {{backend: malloc, size: 64MiB, device: /dev/nbd0}}
  file: {{backend: file, path: {tmp_path}/image, size: 64MiB, device: /dev/nbd1}}
""")
    workers = running.workers()
    fio = [
        subprocess.Popen(
            fio_verify_command(device, "8M", loops="64"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for device in ("/dev/nbd0", "/dev/nbd1")
    ]
    try:
        for seconds in (DAY, -2 * DAY, DAY):
            written = writes(running)
            jump(seconds)
            running.await_true(lambda written=written: writes(running) > written)
        for process in fio:
            output, _ = process.communicate(timeout=100)
            assert process.returncode == 0, output.decode()
    finally:
        for process in fio:
            process.kill()
            process.communicate()
    assert running.workers() == workers
    for word in ("lost a connection", "is silent", "Traceback"):
        assert word not in running.log
    assert running.stop() == 0


def test_the_uptime_does_not_jump(service: Start, jump: Callable[[float], None]) -> None:
    running = service()
    before = running.rpc("reactor_get_status")["uptime"]
    jump(DAY)
    after = running.rpc("reactor_get_status")["uptime"]
    jump(-2 * DAY)
    assert before <= after < before + 600
    assert running.rpc("reactor_get_status")["uptime"] >= after


def writes(running: RunningService) -> int:
    disks = running.rpc("reactor_get_disks")
    count: int = sum(disk["statistics"].get("writes", 0) for disk in disks)
    return count

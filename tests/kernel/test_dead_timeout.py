"""Nobody serves a device for longer than its dead_timeout."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from tests.commands import in_flight
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

DISK = "{backend: malloc, size: 16MiB, dead_timeout: 4, device: /dev/nbd"
CONFIG = f"""
disks:
  alone: {DISK}0}}
  timed: {DISK}1, timeout: 3}}
  idle: {DISK}2}}
"""
FAIL_SECONDS = 40.0


def writer(device: str) -> subprocess.Popen[bytes]:
    command = ["dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "oflag=direct"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def test_what_is_in_flight_waits_on_unless_it_has_a_timeout(service: Start) -> None:
    running = service(CONFIG)
    worker = running.workers()[0]
    worker.suspend()
    with writer("/dev/nbd0") as alone, writer("/dev/nbd1") as timed:
        running.await_true(lambda: all(in_flight(f"/dev/nbd{n}") for n in (0, 1)))
        running.process.kill()
        worker.kill()
        assert timed.wait(FAIL_SECONDS) != 0
        with writer("/dev/nbd2") as later:
            assert later.wait(FAIL_SECONDS) != 0
        assert alone.poll() is None
        again = service(running.config_path.read_text(), runtime_dir=running.runtime_dir)
        assert alone.wait(FAIL_SECONDS) == 0
    for name in ("alone", "timed", "idle"):
        again.await_state(name, "online")

"""tools/load on real devices: it measures, and overwrites nothing that is in use."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import run
from tests.mounting import mounted_new, swapped_to
from tests.running import RunningService

pytestmark = pytest.mark.kernel

LOAD = Path(__file__).parents[2] / "tools/load"
CONFIG = """
disks:
  ram0: {backend: malloc, size: 64MiB, device: /dev/nbd0}
"""


def load(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(LOAD), "--quick", "--seconds", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


@pytest.fixture
def device(service: Callable[..., RunningService]) -> str:
    service(CONFIG)
    return "/dev/nbd0"


def check_refused(device: str, why: str) -> None:
    done = load("--destroy-data", device)
    assert (done.returncode, done.stdout) == (2, "")
    assert why in done.stderr


def test_every_job_runs_on_a_device(device: str) -> None:
    done = load("--destroy-data", device)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 10


def test_a_mounted_device_is_read_but_not_overwritten(device: str, tmp_path: Path) -> None:
    with mounted_new(device, tmp_path / "mount"):
        check_refused(device, "mounted on")
        done = load("--job", "randread", device)
        assert done.returncode == 0, done.stderr
    run("fsck.ext4", "-fn", device)


def test_a_mounted_partition_protects_its_device(device: str, tmp_path: Path) -> None:
    whole_disk = struct.pack("<B3sB3sII", 0, b"", 0x83, b"", 2048, 63 << 11)
    sector = bytes(446) + whole_disk + bytes(48) + b"\x55\xaa"
    with Path(device).open("r+b", buffering=0) as disk:
        disk.write(sector)
    run("blockdev", "--rereadpt", device)
    with mounted_new(f"{device}p1", tmp_path / "mount"):
        check_refused(device, "mounted on")


def test_swap_is_not_overwritten(device: str) -> None:
    with swapped_to(device):
        check_refused(device, "in use as swap")


def test_a_claimed_device_is_not_overwritten(device: str) -> None:
    claim = os.open(device, os.O_RDWR | os.O_EXCL)
    try:
        check_refused(device, "busy")
    finally:
        os.close(claim)


def test_a_read_only_disk_is_not_written(service: Callable[..., RunningService]) -> None:
    service(CONFIG.replace("}", ", readonly: true}"))
    check_refused("/dev/nbd0", "read-only")


def test_a_device_without_a_disk_is_told() -> None:
    done = load("/dev/nbd0")
    assert done.returncode == 1
    assert "no disk is attached" in done.stderr

"""The demonstration: what it shows, and that it would notice a disk that lies."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from reactor.demo.disks import SocketDisk
from reactor.demo.exercise import AREA_BYTES, exercise
from reactor.errors import ReactorError

DEMO = [sys.executable, "-m", "reactor.demo"]


def left_behind() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("nbd-reactor-demo-*"))


def test_once_checks_both_disks_and_stops() -> None:
    before = left_behind()
    done = subprocess.run(
        [*DEMO, "--once"], capture_output=True, text=True, check=False, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "disk memory:" in done.stdout
    assert "disk file:" in done.stdout
    assert done.stdout.count("every byte read is as written") == 2
    assert left_behind() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_serves_until_it_is_stopped(number: signal.Signals) -> None:
    before = left_behind()
    with subprocess.Popen(DEMO, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stdout is not None
        assert any("serving until Ctrl-C" in line for line in demo.stdout)
        demo.send_signal(number)
        assert demo.wait(60) == 0
    assert left_behind() == before


def test_a_disk_that_forgets_is_noticed(tmp_path: Path) -> None:
    path, pid = tmp_path / "nbd.sock", tmp_path / "pid"
    command = ["nbdkit", "-f", "-U", str(path), "--pidfile", str(pid), "null", "64M"]
    with subprocess.Popen(command) as nbdkit:
        try:
            while not pid.exists():  # it appears when the socket listens
                assert nbdkit.poll() is None
            disk = SocketDisk(str(path), memoryview(random.randbytes(AREA_BYTES)))
            try:
                with pytest.raises(ReactorError, match="not what was written"):
                    list(exercise(disk))
            finally:
                disk.close()
        finally:
            nbdkit.terminate()

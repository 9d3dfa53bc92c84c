"""The log, and whoever does not read it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.client import Client
from tests.running import START_SECONDS, STOP_SECONDS
from tests.service.memory_disks import ram


def test_a_log_that_nobody_reads_stops_nothing(tmp_path: Path) -> None:
    """As on a terminal after Ctrl-S: the pipe is full before the service says anything."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, bytes(4096))
    except BlockingIOError:
        os.set_blocking(writing, True)
    config = tmp_path / "disks.yaml"
    config.write_text(ram(tmp_path, "a"))
    command = [sys.executable, "-m", "reactor", "--cores", "0", "--config", str(config)]
    command += ["--runtime-dir", str(tmp_path / "run"), "--log-level", "debug"]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=writing) as service:
        os.close(writing)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (tmp_path / "a.sock").exists():
                assert time.monotonic() < deadline
                time.sleep(0.02)
            with Client(tmp_path / "a.sock", "a") as client:
                client.write(0, b"x" * 4096)
                assert client.read(0, 4096) == b"x" * 4096
        finally:
            service.send_signal(signal.SIGTERM)
            assert service.wait(STOP_SECONDS) == 0
    os.close(reading)

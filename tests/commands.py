"""The programs that a user runs on a device, with deadlines and their output in the failure."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOOL_SECONDS = 240


def run(*command: str, check: bool = True, seconds: float = TOOL_SECONDS) -> str:
    """Run a program; returns what it printed, and fails with it when its status is not 0."""
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
        check=False,
    )
    if check:
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}"
    return done.stdout


def fio_verify_command(device: str, size: str = "16M", **settings: str) -> list[str]:
    """Return an fio that writes random blocks of mixed sizes at depth 32 and verifies them."""
    options = {
        "name": "verify",
        "filename": device,
        "ioengine": "libaio",
        "direct": "1",
        "rw": "randwrite",
        "bsrange": "4k-64k",
        "iodepth": "32",
        "size": size,
        "verify": "crc32c",
        "verify_fatal": "1",
        "verify_state_save": "0",
        "do_verify": "1",
        "output-format": "json",
        **settings,
    }
    return ["fio", *(f"--{name}={value}" for name, value in options.items())]


def fio_verify(device: str, size: str = "16M", **settings: str) -> dict[str, Any]:
    """Run it to its end; returns the job's results."""
    output = run(*fio_verify_command(device, size, **settings))
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]
    assert job["error"] == 0
    assert job["write"]["total_ios"] > 0
    assert job["read"]["total_ios"] > 0, "nothing was read back"
    return job


@contextmanager
def endless_writes(device: str, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """fio that writes until it meets an error."""
    endless = {"time_based": "1", "runtime": "200", "do_verify": "0", "verify": "0"}
    fio = subprocess.Popen(
        fio_verify_command(device, "32M", **endless, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield fio
    finally:
        fio.kill()
        fio.wait()


def ctl_command(runtime_dir: Path, *arguments: str) -> list[str]:
    """Return an nbd-reactorctl."""
    socket = str(runtime_dir / "rpc.sock")
    return [sys.executable, "-m", "reactor.ctl", "--socket", socket, *arguments]


def ctl(runtime_dir: Path, *arguments: str) -> str:
    """Run nbd-reactorctl."""
    return run(*ctl_command(runtime_dir, *arguments))


def attached(device: str) -> bool:
    """Whether the kernel has the device configured."""
    return Path("/sys/block", Path(device).name, "pid").exists()


def in_flight(device: str) -> int:
    """How many requests the kernel has begun on the device and not ended."""
    counts = Path("/sys/block", Path(device).name, "inflight").read_text()
    return sum(map(int, counts.split()))


def nbdsh(uri: str, script: str) -> str:
    """Run a script of libnbd's shell, which needs the distribution's Python."""
    return run("/usr/bin/python3", "-m", "nbd", "-u", uri, "-c", script)

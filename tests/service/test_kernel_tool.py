"""tools/kernel: the command's status and output pass through, and nothing is left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

KERNEL = Path(__file__).parents[2] / "tools/kernel"

pytestmark = pytest.mark.skipif(
    shutil.which("linux.uml") is None or "KERNEL_GUEST" in os.environ,
    reason="needs the package user-mode-linux, on the host",
)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"TMPDIR": str(tmp_path), "GREETING": "it's $here"}


def kernel(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [KERNEL, *words], env=environment, capture_output=True, text=True, timeout=60, check=False
    )


def test_status_output_and_environment_pass_through(
    environment: dict[str, str], tmp_path: Path
) -> None:
    script = 'pwd; echo "$GREETING"; id -u; ls -d /dev/nbd*; echo wrong >&2; sleep 99 & exit 7'
    done = kernel(environment, "--nbds", "2", "--", "sh", "-c", script)
    assert done.stdout == f"{Path.cwd()}\nit's $here\n0\n/dev/nbd0\n/dev/nbd1\n"
    assert (done.stderr, done.returncode) == ("wrong\n", 7)
    assert not list(tmp_path.iterdir())


def test_long_output_is_whole(environment: dict[str, str]) -> None:
    done = kernel(environment, "--no-nbd", "--", "seq", "200000")
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 200001))


def test_a_disk_is_a_block_device_that_keeps_what_is_written(
    environment: dict[str, str], tmp_path: Path
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    script = 'printf hello | dd of="$KERNEL_DISK" conv=notrunc status=none; echo $KERNEL_DISKS'
    done = kernel(environment, "--disk", str(image), "--disk-size", "1M", "--", "sh", "-c", script)
    assert (done.stdout, done.returncode) == ("/dev/ubda /dev/ubdb\n", 0), done.stderr
    assert image.read_bytes()[:6] == b"hello\0"


def test_it_ends_when_its_time_is_over(environment: dict[str, str], tmp_path: Path) -> None:
    done = kernel(environment, "--timeout", "5", "--", "sleep", "99")
    assert (done.stderr, done.returncode) == ("kernel: killed after 5 s\n", 124)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_everything(
    environment: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    command = [KERNEL, "--", "sh", "-c", "echo up; sleep 99"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        running.send_signal(number)
    expected = -number if number == signal.SIGKILL else 128 + number
    assert running.returncode == expected
    deadline = time.monotonic() + 10
    while list(tmp_path.iterdir()) or guests(tmp_path):  # after SIGKILL another process cleans up
        assert time.monotonic() < deadline
        time.sleep(0.01)


def guests(directory: Path) -> list[str]:
    """Return the kernels that run for `directory`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if f"uml_dir={directory}" in command:
            found.append(command)
    return found


def test_wrong_usage_says_what_is_wrong(environment: dict[str, str]) -> None:
    for words in ([], ["true"], ["--"], ["--disk", "/nonexistent", "--", "true"]):
        done = kernel(environment, *words)
        assert done.returncode == 2
        assert "kernel: error: " in done.stderr


def test_missing_packages_are_named(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "python3").symlink_to(Path(sys.executable).resolve())
    environment["PATH"] = str(tmp_path)
    environment["TMPDIR"] = tempfile.gettempdir()
    done = kernel(environment, "--", "true")
    assert done.returncode == 125
    assert done.stderr == (
        "kernel: missing packages; install them with: apt-get install iproute2 user-mode-linux\n"
    )

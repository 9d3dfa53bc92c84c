"""tools/load, against nbdkit: what it measures, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

LOAD = Path(__file__).parents[2] / "tools/load"
READING = ["randread", "read"]
ALL = [*READING, "randwrite", "write", "randrw", "verify", "trim"]


def load(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(LOAD), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, **environment},
    )


@pytest.fixture
def nbdkit(tmp_path: Path) -> Iterator[Callable[..., str]]:
    """Serve with nbdkit; gives the URI."""
    servers = []

    def serve(*arguments: str) -> str:
        socket, pid = tmp_path / "nbd.sock", tmp_path / "nbdkit.pid"
        command = ["nbdkit", "-f", "-U", str(socket), "--pidfile", str(pid), *arguments]
        servers.append(subprocess.Popen(command))
        while not pid.exists():  # it appears when the socket listens
            assert servers[-1].poll() is None
        return f"nbd+unix:///?socket={socket}"

    yield serve
    for server in servers:
        server.terminate()
        server.wait(10)


def test_every_job_runs_on_an_export_and_is_shown(nbdkit: Callable[..., str]) -> None:
    uri = nbdkit("memory", "64M")
    done = load("--seconds", "1", "--quick", "--destroy-data", "--uri", uri)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert " ".join(head.split()) == "job I/O IOPS MB/s p50 us p99 us p99.9 us"
    assert [row.split()[0] for row in rows] == sorted(
        [*ALL, "randrw", "verify"], key=ALL.index
    )  # these two read and write


def test_json_gives_what_fio_measured(nbdkit: Callable[..., str]) -> None:
    uri = nbdkit("memory", "64M")
    done = load("--job", "randread", "--seconds", "1", "--json", "--uri", uri)
    (row,) = json.loads(done.stdout)
    assert (row["job"], row["direction"]) == ("randread", "read")
    # fio counts the two over slightly different times.
    assert row["bytes_per_second"] == pytest.approx(row["iops"] * 4096, rel=0.01)
    latency = row["latency_us"]
    assert 0 < latency["50"] <= latency["99"] <= latency["99.9"]


def test_without_destroy_data_only_reading_jobs_run(nbdkit: Callable[..., str]) -> None:
    uri = nbdkit("-r", "memory", "64M")
    done = load("--quick", "--seconds", "1", "--uri", uri)
    assert done.returncode == 0, done.stderr
    assert [row.split()[0] for row in done.stdout.splitlines()[1:]] == READING
    assert "--destroy-data adds" in done.stderr


def test_a_writing_job_needs_destroy_data(nbdkit: Callable[..., str]) -> None:
    done = load("--job", "write", "--uri", nbdkit("memory", "64M"))
    assert done.returncode == 2
    assert "--destroy-data" in done.stderr


def test_verify_finds_a_disk_that_forgets(nbdkit: Callable[..., str]) -> None:
    done = load("--job", "verify", "--quick", "--destroy-data", "--uri", nbdkit("null", "64M"))
    assert done.returncode == 1
    assert "verify" in done.stderr
    assert not done.stdout


def test_an_io_error_is_told(nbdkit: Callable[..., str]) -> None:
    uri = nbdkit("--filter=error", "memory", "64M", "error=EIO", "error-rate=100%")
    done = load("--job", "read", "--quick", "--uri", uri)
    assert done.returncode == 1
    assert "Input/output error" in done.stderr


def test_no_server_is_told(tmp_path: Path) -> None:
    done = load("--quick", "--uri", f"nbd+unix:///?socket={tmp_path}/none.sock")
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr


def test_a_missing_fio_says_how_to_get_it(tmp_path: Path) -> None:
    done = load("--uri", "nbd://localhost", PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt-get install fio" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a device or a --uri"),
        (["--uri", "http://localhost"], "expected nbd://"),
        (["--seconds", "0", "/dev/nbd0"], "expected whole seconds"),
        (["--job", "unheard-of", "/dev/nbd0"], "invalid choice"),
        (["--destroy-data", "/dev/null"], "not a block device"),
        (["--destroy-data", __file__], "not a block device"),
        (["--destroy-data", "/dev/nbd-none"], "No such file"),
        (["--uri", "nbd://localhost", "/dev/nbd0"], "not allowed with"),
    ],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str], message: str) -> None:
    done = load(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_that_is_not_nbd_is_refused() -> None:
    others = [disk for disk in Path("/sys/block").iterdir() if not disk.name.startswith("nbd")]
    nodes = [node for disk in others if (node := Path("/dev", disk.name)).is_block_device()]
    if not nodes:
        pytest.skip("this machine shows no block device")
    done = load("--destroy-data", str(nodes[0]))
    assert done.returncode == 2
    assert "not an nbd device" in done.stderr


def test_list_shows_the_commands_and_runs_nothing(tmp_path: Path) -> None:
    done = load("--list", PATH=str(tmp_path))
    assert done.returncode == 0
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [
        ["fio", f"--name={name}"] for name in ALL
    ]

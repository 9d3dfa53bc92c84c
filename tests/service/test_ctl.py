"""nbd-reactorctl and the metrics against the running service."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import RunningService

Start = Callable[..., RunningService]
Ctl = Callable[..., tuple[int, str, str]]

MIB = 1 << 20


def ctl(running: RunningService, *arguments: str) -> tuple[int, str, str]:
    """Run nbd-reactorctl; returns its exit status, output and errors."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "nbd-reactorctl"),
            *("--socket", str(running.rpc_socket)),
            *arguments,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def running(service: Start, tmp_path: Path) -> RunningService:
    return service(f"""
disks:
  ram0: {{backend: malloc, size: 32MiB, listen: 'unix:{tmp_path}/ram0.sock'}}
  img: {{backend: file, path: {tmp_path}/img, size: 8MiB, listen: 'unix:{tmp_path}/img.sock'}}
""")


def size_of(path: Path, export: str) -> int:
    command = ["nbdinfo", "--size", f"nbd+unix:///{export}?socket={path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


def test_what_runs_where_is_shown(running: RunningService, tmp_path: Path) -> None:
    status, out, _ = ctl(running, "status")
    assert status == 0
    assert f"pid {running.process.pid}, up" in out
    assert "disks: 2 online" in out
    pid = running.workers()[0].pid
    assert re.search(rf"^0 +{pid} +running +0 .* ram0 img$", out, re.MULTILINE)
    lines = ctl(running, "list")[1].splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["ram0", "online", "32MiB"],
        ["img", "online", "8MiB"],
    ]
    assert f"unix:{tmp_path}/ram0.sock" in lines[1]
    shown = ctl(running, "show", "img")[1]
    assert f"path: {tmp_path}/img" in shown
    assert f"core 0, pid {pid}" in shown


def test_a_disk_is_made_resized_stopped_started_and_removed(
    running: RunningService, tmp_path: Path
) -> None:
    path = tmp_path / "new.sock"
    made = ctl(running, "start", "new", "backend=malloc", "size=4MiB", f"listen=unix:{path}")
    assert made == (0, f"new: online, 4MiB, unix:{path}\n", "")
    assert size_of(path, "new") == 4 * MIB
    assert ctl(running, "resize", "new", "6MiB")[0] == 0
    assert size_of(path, "new") == 6 * MIB
    assert ctl(running, "stop", "new")[:2] == (0, "new: stopped\n")
    assert not path.exists()
    assert "stopped" in ctl(running, "list")[1]
    assert ctl(running, "start", "new")[0] == 0
    assert size_of(path, "new") == 6 * MIB
    assert ctl(running, "remove", "new")[:2] == (0, "new: removed\n")
    assert ctl(running, "show", "new")[0] == 1
    assert not path.exists()


def test_a_disk_that_cannot_be_made_is_a_clear_error_and_leaves_nothing(
    running: RunningService, tmp_path: Path
) -> None:
    for keys, text in [
        (["backend=file", f"path={tmp_path}/absent"], "no such file"),
        (["backend=file", f"path={tmp_path}"], "directory"),
        (["backend=malloc"], "size: missing; the backend malloc needs it"),
        (["backend=malloc", "size=1000"], "1000 is not a multiple of the block size"),
        (["backend=mallok", "size=1MiB"], 'did you mean "malloc"?'),
        (["backend=null", "size=1MiB", "core=9"], "core 9 is not one of the service's"),
    ]:
        status, out, err = ctl(running, "start", "new", *keys)
        assert (status, out) == (1, "")
        assert err.startswith("nbd-reactorctl: reactor_start_disk: ")
        assert text in err
        assert err.count("\n") == 1
    assert len(running.rpc("reactor_get_disks")) == 2


def test_a_reload_changes_what_has_changed(running: RunningService) -> None:
    text = running.config_path.read_text()
    running.config_path.write_text(text + "  more: {backend: 'null', size: 1MiB}\n")
    assert ctl(running, "reload") == (0, "config reloaded\n", "")
    running.await_state("more", "online")
    running.config_path.write_text(text.replace("size", "sice"))
    status, _, err = ctl(running, "reload")
    assert status == 1
    assert f"{running.config_path}:3: disks.ram0.sice: unknown key" in err
    assert len(running.rpc("reactor_get_disks")) == 3
    running.config_path.write_text(text + "  bad: {backend: file, path: /nonexistent/x}\n")
    for status in (1, 0):  # one that had failed before is no news
        status_found, _, err = ctl(running, "reload")
        assert status_found == status
        assert ("config reloaded, but disk bad failed: /nonexistent/x" in err) == bool(status)


def test_a_worker_that_died_is_seen_as_restarted(running: RunningService) -> None:
    before = running.workers()[0].pid
    running.workers()[0].send_signal(signal.SIGKILL)
    running.await_true(lambda: running.rpc("reactor_get_workers")[0]["restarts"] == 1)
    running.await_state("ram0", "online")
    [worker] = json.loads(ctl(running, "status", "--json")[1])["workers"]
    assert worker["pid"] != before
    assert worker["disks"] == ["ram0", "img"]


def test_no_service_is_one_line_and_status_1(running: RunningService) -> None:
    assert running.stop() == 0
    status, out, err = ctl(running, "list")
    assert (status, out) == (1, "")
    assert err.startswith(f"nbd-reactorctl: no service at {running.rpc_socket}")


def test_a_second_service_on_the_rpc_socket_is_refused(
    running: RunningService, service: Start
) -> None:
    arguments = ("--rpc-socket", str(running.rpc_socket))
    second = service(None, *arguments, await_ready=False)
    assert second.process.wait(60) == 1
    assert f"RPC socket {running.rpc_socket}: another service serves it" in second.log
    assert ctl(running, "list")[0] == 0


def test_the_metrics_follow_the_io(service: Start, tmp_path: Path) -> None:
    path = tmp_path / "ram0.sock"
    config = f"disks: {{ram0: {{backend: malloc, size: 1MiB, listen: 'unix:{path}'}}}}"
    running = service(config, "--metrics", "127.0.0.1:20917")

    def page() -> str:
        with urllib.request.urlopen("http://127.0.0.1:20917/metrics", timeout=20) as response:
            return str(response.read().decode())

    assert 'nbd_reactor_worker_up{core="0"} 1\n' in page()
    with (tmp_path / "copy").open("wb") as copy:
        command = ["nbdcopy", f"nbd+unix:///ram0?socket={path}", "-"]
        subprocess.run(command, stdout=copy, check=True, timeout=60)
    # Memory that was never written may be reported as such instead of being read.
    running.await_true(lambda: re.search(r'_reads_total\{disk="ram0"\} [1-9]', page()) is not None)

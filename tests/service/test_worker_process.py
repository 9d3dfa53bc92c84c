"""A worker's process at its start: what it finds in its way, and a parent that is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import ctl
from tests.running import RunningService
from tests.service.memory_disks import nbdsh, ram

Start = Callable[..., RunningService]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


ODD_FILES: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "directory": Path.mkdir,
    "dangling link": lambda path: path.symlink_to("nothing"),
    "looping link": lambda path: path.symlink_to(path),
    "link to a file": lambda path: path.symlink_to("instance"),
    "socket": make_socket,
}


@pytest.mark.parametrize("kind", ODD_FILES)
def test_what_is_no_lock_file_is_named_and_the_core_given_up(
    service: Start, tmp_path: Path, kind: str
) -> None:
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    path = runtime_dir / "worker-0.lock"
    ODD_FILES[kind](path)
    running = service(ram(tmp_path, "a"), runtime_dir=runtime_dir)
    cure = f"{path} is not a regular file that can be written; remove it, then start a disk"
    assert running.log.count(cure) == 1  # it is not tried again
    assert running.log.count("worker core 0 is given up") == 1
    disk = running.rpc("reactor_get_disks", name="a")[0]
    why = "the worker of core 0 cannot start; the log says why"
    assert (disk["state"], disk["reason"]) == ("failed", why)
    assert "failed" in ctl(runtime_dir, "status")
    assert "Traceback" not in running.log
    if kind == "directory":
        path.rmdir()
    else:
        path.unlink()
    ctl(runtime_dir, "start", "a")
    nbdsh(tmp_path, "a", "h.pwrite(b'a' * 4096, 0)")


def test_a_stop_leaves_what_is_not_its_own(service: Start, tmp_path: Path) -> None:
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    (runtime_dir / "worker-7.lock").mkdir()
    running = service(ram(tmp_path, "a"), runtime_dir=runtime_dir)
    assert running.stop() == 0
    assert f"{runtime_dir}/worker-7.lock" in running.log
    assert "Traceback" not in running.log
    assert (runtime_dir / "worker-7.lock").is_dir()


def test_a_worker_whose_parent_died_before_it_began_ends(tmp_path: Path) -> None:
    arguments = ["--runtime-dir", str(tmp_path), "--instance", "0badcafe", "--mode", "interrupt"]
    arguments += ["--log-format", "text", "--log-level", "info"]
    reading, writing = os.pipe()
    ended, ends = os.pipe()  # its other end is closed when nobody has it any more
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:], pass_fds=[int(sys.argv[-1])])"
    program = (
        "import runpy, sys; sys.argv.pop(); runpy.run_module('reactor.data', run_name='__main__')"
    )
    worker = [sys.executable, "-c", program, *arguments, str(ends)]
    with subprocess.Popen(
        [sys.executable, "-c", script, *worker], stdin=reading, pass_fds=[ends]
    ) as parent:
        parent.wait()
    os.close(reading)
    os.close(ends)
    os.write(writing, f"0 {parent.pid}\n".encode())
    os.close(writing)
    assert os.read(ended, 1) == b""
    os.close(ended)
    assert (tmp_path / "worker-0.lock").exists()
    assert not (tmp_path / "worker-0.sock").exists()

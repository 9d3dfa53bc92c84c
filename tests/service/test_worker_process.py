"""A worker's process at its start: what it finds in its way, and a parent that is gone."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.commands import ctl
from tests.running import RunningService, copy_program
from tests.service.memory_disks import nbdsh, ram

Start = Callable[..., RunningService]
SHORTAGE = 4  # exit status


def worker_arguments(folder: Path) -> list[str]:
    arguments = ["--runtime-dir", str(folder), "--instance", "0badcafe", "--mode", "interrupt"]
    return [*arguments, "--log-format", "text", "--log-level", "info"]


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


@pytest.mark.parametrize("more", [1, 4, 8, 12, 16, 20, 24])
def test_a_worker_without_memory_says_so_wherever_its_boot_ends(tmp_path: Path, more: int) -> None:
    check_shortage(tmp_path, resource.RLIMIT_AS, more << 20, "memory|failed to map|exception")


@pytest.mark.parametrize("files", [4, 6, 8, 10, 12])
def test_a_worker_without_descriptors_says_so(tmp_path: Path, files: int) -> None:
    check_shortage(tmp_path, resource.RLIMIT_NOFILE, files, "Too many open files")


def check_shortage(folder: Path, limit: int, value: int, why: str) -> None:
    program = """
import resource, runpy, sys
limit, value = map(int, sys.argv[-2:])
del sys.argv[-2:]
if limit == resource.RLIMIT_AS:  # beyond what the interpreter has
    value += int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(limit, (value, value))
runpy.run_module("reactor.data", run_name="__main__", alter_sys=True)
"""
    command = [sys.executable, "-c", program, *worker_arguments(folder), str(limit), str(value)]
    done = subprocess.run(
        command, input=f"0 {os.getpid()}\n", stderr=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == SHORTAGE, done.stderr
    assert re.fullmatch(f".*cannot (start|be loaded): .*({why}).*\n", done.stderr), done.stderr


def test_a_boot_that_cannot_go_on_ends_a_start(tmp_path: Path, service: Start) -> None:
    program = copy_program(tmp_path / "program")
    (program / "reactor" / "data" / "__main__.py").write_text("raise SystemExit(1)\n")
    running = service(ram(tmp_path, "a"), program=program)
    assert "worker core 0 is given up" in running.log
    assert running.await_state("a", "failed")["reason"] == "the worker of core 0 keeps dying"


def test_a_stopped_worker_leaves_its_stack(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    worker = running.workers()[0]
    worker.suspend()
    running.await_line(f"(pid {worker.pid}) is silent for")
    running.await_line("worker core 0 was ended by signal 6")
    assert "it did not even abort" not in running.log
    assert "Fatal Python error: Aborted" in running.log
    running.await_state("a", "online")


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
    reading, writing = os.pipe()
    ended, ends = os.pipe()  # its other end is closed when nobody has it any more
    script = "import subprocess, sys; subprocess.Popen(sys.argv[1:], pass_fds=[int(sys.argv[-1])])"
    program = (
        "import runpy, sys; sys.argv.pop(); runpy.run_module('reactor.data', run_name='__main__')"
    )
    worker = [sys.executable, "-c", program, *worker_arguments(tmp_path), str(ends)]
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


def test_a_worker_whose_cpu_is_offline_runs_on_the_others(tmp_path: Path) -> None:
    core = 1000
    worker = [sys.executable, "-m", "reactor.data", *worker_arguments(tmp_path)]
    with subprocess.Popen(
        worker, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin
        assert process.stderr
        process.stdin.write(f"{core} {os.getpid()}\n")
        process.stdin.flush()
        assert f"CPU {core} is offline" in process.stderr.readline()
        while not (tmp_path / f"worker-{core}.sock").exists():
            assert process.poll() is None
        assert psutil.Process(process.pid).cpu_affinity() == sorted(os.sched_getaffinity(0))
        process.kill()


def test_a_worker_that_lost_an_answer_for_want_of_memory_is_followed_by_another(
    service: Start, tmp_path: Path
) -> None:
    program, short = copy_program(tmp_path / "program"), tmp_path / "short"
    path = program / "reactor/data/connection.py"
    completed = "        self._in_flight -= 1\n        if command"
    lacking = f"        if os.path.exists({str(short)!r}):\n            raise MemoryError\n"
    text = path.read_text()
    assert text.count(completed) == 1
    path.write_text(text.replace(completed, lacking + completed))
    options = f"path: {tmp_path}/image, size: 8MiB, listen: 'unix:{tmp_path}/a.sock'"
    running = service(f"disks:\n  a: {{backend: file, {options}}}\n", program=program)
    nbdsh(tmp_path, "a", "h.pwrite(b'a' * 4096, 0); h.flush()")
    short.touch()
    lost = (
        "try:\n    h.flush()\nexcept nbd.Error:\n    pass\nelse:\n    raise SystemExit('answered')"
    )
    nbdsh(tmp_path, "a", lost)
    short.unlink()
    running.await_line("worker core 0 ended by itself with status 4")
    running.await_line("worker core 0 runs")
    running.await_state("a", "online")
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'a' * 4096")
    assert "Traceback" not in running.log

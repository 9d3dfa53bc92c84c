"""What a server's processes use: CPU, memory and system calls."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeAlias

import psutil

STOP_SECONDS: Final = 10.0
TRACER_SECONDS: Final = 20.0

#: Returns the system calls that a tree makes during the work that is done in between.
SyscallCounter: TypeAlias = Callable[[int, Callable[[], None]], int]


def pinned(core: int, *command: str) -> list[str]:
    """Return a command that runs on one core, before everything else there when root asks."""
    first = ["nice", "--adjustment=-20"] if os.geteuid() == 0 else []
    return ["taskset", "--cpu-list", str(core), *first, *command]


def tree(pid: int) -> list[psutil.Process]:
    """Return the process `pid` and all that descend from it; nothing when it has ended."""
    try:
        root = psutil.Process(pid)
        if root.status() == psutil.STATUS_ZOMBIE:
            return []
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a tree, with that of children it has waited for."""
    return sum(cpu_seconds_of_each(pid).values())


def cpu_seconds_of_each(pid: int) -> dict[int, float]:
    """Return the CPU time of each process of a tree, with that of children it has waited for."""
    found = {}
    for process in tree(pid):
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            _user, _system, *of_children = process.cpu_times()[:4]
            found[process.pid] = time.clock_gettime(_cpu_clock(process.pid)) + sum(of_children)
    return found


def _cpu_clock(pid: int) -> int:
    """Return the clock of a process's CPU time, as clock_getcpuclockid(3); in nanoseconds."""
    return ~pid << 3 | 2


def resident_bytes(pid: int) -> list[int]:
    """Return the resident memory of each process of a tree, without shared memory."""
    found = []
    for process in tree(pid):
        with contextlib.suppress(OSError, KeyError):  # it has ended
            status = Path(f"/proc/{process.pid}/status").read_text()
            parts = dict(re.findall(r"^(Rss\w+):\s+(\d+) kB", status, re.MULTILINE))
            found.append((int(parts["RssAnon"]) + int(parts["RssFile"])) << 10)
    return found


def stop(processes: Sequence[psutil.Process]) -> None:
    """Terminate the first of a tree, and kill what is left of it after a while."""
    if not processes:  # it has ended by itself
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        processes[0].terminate()
    _gone, left = psutil.wait_procs(processes, STOP_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, STOP_SECONDS)


def syscall_counter() -> tuple[str, SyscallCounter] | None:
    """Return how system calls are counted here, and the function that does it."""
    # perf first: strace slows a server so much that larger batches wait for it.
    if shutil.which("perf"):
        try_it = ["perf", "stat", "-e", "raw_syscalls:sys_enter", "true"]
        if subprocess.run(try_it, capture_output=True, check=False).returncode == 0:
            return "perf", _count_by_perf
    return ("strace", _count_by_strace) if shutil.which("strace") else None


def _count_by_perf(pid: int, work: Callable[[], None]) -> int:
    """Return the system calls that the tree makes during `work`."""
    control_read, control_write = os.pipe()
    ack_read, ack_write = os.pipe()
    pids = ",".join(str(process.pid) for process in tree(pid))
    command = ["perf", "stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-p", pids]
    # It starts disabled and says when it counts.
    command += ["--delay", "-1", "--control", f"fd:{control_read},{ack_write}"]
    try:
        perf = subprocess.Popen(
            command, pass_fds=(control_read, ack_write), stderr=subprocess.PIPE, text=True
        )
        os.close(ack_write)
        for order in ("enable", "disable"):
            os.write(control_write, f"{order}\n".encode())
            if not os.read(ack_read, 16):
                break
            if order == "enable":
                work()
        perf.send_signal(signal.SIGINT)
        _, said = perf.communicate(timeout=TRACER_SECONDS)
    finally:
        for fd in (control_read, control_write, ack_read):
            os.close(fd)
    counts = re.findall(r"^(\d+),", said, re.MULTILINE)
    if not counts:
        raise OSError(f"perf counted nothing: {said.strip()}")
    return sum(map(int, counts))


def _count_by_strace(pid: int, work: Callable[[], None]) -> int:
    """Return the system calls that the tree makes during `work`."""
    pids = [str(process.pid) for process in tree(pid)]
    with tempfile.NamedTemporaryFile("r") as summary:
        command = ["strace", "-f", "-c", "-o", summary.name]
        command += [word for each in pids for word in ("-p", each)]
        strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert strace.stderr is not None
        for _ in pids:
            strace.stderr.readline()  # "Process N attached"
        work()
        strace.send_signal(signal.SIGINT)
        strace.communicate(timeout=TRACER_SECONDS)
        totals = re.findall(
            r"^\s*100\.00\s+\S+\s+\S+\s+(\d+).*total$", summary.read(), re.MULTILINE
        )
    if not totals:
        raise OSError("strace counted nothing")
    return int(totals[0])

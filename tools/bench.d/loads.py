"""Puts load on a server: by our generator, or by fio."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import processes
from points import Point
from servers import EXPORT, BenchError, Server

# What a load may take beyond its time: a slow server's depth of large requests, and starting.
PATIENCE_SECONDS: Final = 60.0
#: What is used to fill and check each disk before anything is measured on it.
VERIFIED: Final = Point(50, 128 << 10, 8)
VERIFIED_SECONDS: Final = 0.2

Measures = dict[str, float]


class Generator:
    """Our generator on one connection: its handshake is done and it waits for `run`."""

    def __init__(
        self, program: Path, core: int, socket: Path, export: str, options: Sequence[str]
    ) -> None:
        self._process = subprocess.Popen(
            processes.pinned(core, str(program), *options, str(socket), export),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._said = ""

    @property
    def pid(self) -> int:
        """The generator's process."""
        return self._process.pid

    def await_ready(self) -> None:
        """Wait for the end of the handshake."""
        self._line(PATIENCE_SECONDS)

    def run(self, seconds: float) -> Mapping[str, float]:
        """Put the load on, which takes `seconds`; returns what the generator tells of it."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told: dict[str, float] = json.loads(self._line(seconds + PATIENCE_SECONDS))
        return told

    def close(self) -> None:
        """Disconnect."""
        try:
            _, self._said = self._process.communicate(timeout=PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def check(self) -> None:
        """Raise BenchError when what came after its run failed; it is closed."""
        if self._process.returncode:
            raise BenchError(self._said.strip() or "the load did not end")

    def _line(self, seconds: float) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], seconds)
        line = self._process.stdout.readline() if ready else ""
        if not line:
            self._process.kill()
            _, said = self._process.communicate()
            raise BenchError(said.strip() or "the load did not end")
        return line


@contextlib.contextmanager
def connected(
    program: Path, core: int, server: Server, options: Sequence[str]
) -> Iterator[Generator]:
    """Connect our generator to a server until the end of the context."""
    generator = Generator(program, core, server.place.socket, EXPORT, options)
    try:
        generator.await_ready()
        yield generator
    finally:
        generator.close()


def options_of(point: Point, until: str, *, apart: bool = False) -> list[str]:
    """Return the generator's options for a point; `until` is the one that ends the load."""
    options = [f"--reads={point.reads}", f"--bytes={point.bytes}", f"--depth={point.depth}", until]
    return options + ["--sequential"] * point.sequential + ["--apart"] * apart


def verify(program: Path, core: int, server: Server) -> None:
    """Fill the disk, and check that it holds what is written to it."""
    options = [*options_of(VERIFIED, f"--seconds={VERIFIED_SECONDS}"), "--verify"]
    with connected(program, core, server, options) as generator:
        generator.run(VERIFIED_SECONDS)
    generator.check()  # it reads back what is there after it has told the result


def by_generator(
    program: Path, core: int, server: Server, point: Point, seconds: float, *, apart: bool
) -> Measures:
    """Measure a point with our generator."""
    options = options_of(point, f"--seconds={seconds}", apart=apart)
    with connected(program, core, server, options) as generator:
        before = processes.cpu_seconds(server.pid)
        told = generator.run(seconds)
        used = processes.cpu_seconds(server.pid) - before
    iops = told["requests"] / told["seconds"]
    return {
        "iops": iops,
        "bytes_per_second": iops * point.bytes,
        **{f"{name}_us": told[f"{name}_us"] for name in ("p50", "p99", "p99.9")},
        "server_cpu_us": used * 1e6 / told["requests"],
        "load_cpu": told["load_cpu_seconds"] / told["seconds"],
    }


def syscalls(
    program: Path,
    core: int,
    server: Server,
    options: Sequence[str],
    count: processes.SyscallCounter,
) -> float:
    """Return the server's system calls per request; nothing else is measured meanwhile."""
    requests = 0.0

    def work() -> None:
        nonlocal requests
        requests = generator.run(PATIENCE_SECONDS)["requests"]

    with connected(program, core, server, options) as generator:
        counted = count(server.pid, work)
    return counted / requests


def fio_speaks_nbd() -> bool:
    """Whether fio was built with its NBD client."""
    help_ = subprocess.run(["fio", "--enghelp=nbd"], capture_output=True, text=True, check=False)
    return "uri" in help_.stdout


def by_fio(
    core: int, target: Sequence[str], point: Point, seconds: float, pid: int | None
) -> Measures:
    """Measure a point with fio; `pid` is the server's, or none when fio itself does the I/O."""
    before = processes.cpu_seconds(pid) if pid else 0.0
    job = _fio(core, target, point, seconds)
    parts = [job[name] for name in ("read", "write") if job[name]["total_ios"]]
    requests = sum(part["total_ios"] for part in parts)
    iops = sum(part["iops"] for part in parts)
    if pid:
        used = processes.cpu_seconds(pid) - before
    else:
        used = (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
    latencies = {
        # Of a mixed load, the slower direction's.
        f"{name}_us": max(part["clat_ns"]["percentile"][key] for part in parts) / 1000
        for name, key in (("p50", "50.000000"), ("p99", "99.000000"), ("p99.9", "99.900000"))
    }
    return {
        "iops": iops,
        "bytes_per_second": iops * point.bytes,
        **latencies,
        "server_cpu_us": used * 1e6 / requests,
        "load_cpu": (job["usr_cpu"] + job["sys_cpu"]) / 100,
    }


def _fio(core: int, target: Sequence[str], point: Point, seconds: float) -> dict[str, Any]:
    order = "" if point.sequential else "rand"
    verb = {100: "read", 0: "write"}.get(point.reads, "rw")
    command = ["fio", "--name=bench", *target, f"--rw={order}{verb}", f"--bs={point.bytes}"]
    command += [f"--rwmixread={point.reads}", f"--iodepth={point.depth}", "--thread"]
    command += ["--time_based", f"--runtime={round(seconds * 1000)}ms", "--norandommap"]
    command += ["--randrepeat=1", "--output-format=json"]
    try:
        done = subprocess.run(
            processes.pinned(core, *command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds + PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError("fio did not end") from error
    start = done.stdout.find("{")  # fio prints its notes before the JSON
    if done.returncode or start < 0:
        raise BenchError(f"fio: {(done.stderr or done.stdout).strip()[-300:]}")
    job: dict[str, Any] = json.loads(done.stdout[start:])["jobs"][0]
    return job

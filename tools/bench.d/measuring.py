"""Runs the cases: all servers of a kind at the same time, loaded in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import loads
import processes
import servers
from points import KINDS, Case
from results import Results, Row
from servers import BenchError, Place, Server

SHARED_MEMORY: Final = Path("/dev/shm")
IDLE_DISKS: Final = 64
IDLE_SETTLING_SECONDS: Final = 1.0  # after its last request a server may look for more


@dataclass(frozen=True)
class Plan:
    """How to measure. Sizes in bytes."""

    cases: Sequence[Case]
    repetitions: int
    seconds: float  # of one measurement
    idle_seconds: float  # 0: not measured
    size: int  # of each disk
    server_core: int
    load_core: int
    directory: Path  # for disks that are files


def measure(plan: Plan, results: Results) -> None:
    """Run everything; what does not work is noted, and the others go on."""
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as work:
        bench = _Bench(plan, results, Path(work))
        bench.build()
        for kind in KINDS:
            cases = [case for case in plan.cases if case.kind == kind and bench.can_load(case)]
            if cases:
                bench.measure_kind(kind, cases)
        if plan.idle_seconds and bench.load:
            bench.measure_idle_disks()


class _Bench:
    def __init__(self, plan: Plan, results: Results, work: Path) -> None:
        self.plan = plan
        self.results = results
        self.work = work
        self.load: Path | None = None
        self.floor: Path | None = None
        counter = processes.syscall_counter()
        self.count = counter[1] if counter else None
        results.about["syscalls_counted_by"] = counter[0] if counter else None
        if counter is None:
            self.note("system calls are not counted: needs perf or strace")

    def note(self, text: str) -> None:
        """Tell once what is left out."""
        if text not in self.results.notes:
            self.results.notes.append(text)
            say(text)

    def build(self) -> None:
        """Compile our programs."""
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            self.note("no C compiler: only fio puts load on, and there is no floor")
            return
        built = []
        for name in ("load", "floor"):
            program = self.work / name
            source = servers.HERE / f"{name}.c"
            command = [compiler, "-std=gnu11", "-O2", "-o", str(program), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise BenchError(f"{source.name}: {done.stderr.strip()}")
            built.append(program)
        self.load, self.floor = built

    def can_load(self, case: Case) -> bool:
        """Whether the program for a case's load is there."""
        if case.load != "fio":
            return self.load is not None
        if shutil.which("fio") is None:
            self.note("fio: not installed (Debian package fio)")
            return False
        return True

    def measure_kind(self, kind: str, cases: Sequence[Case]) -> None:
        """Run the cases of one kind of disk."""
        with contextlib.ExitStack() as stack:
            alive = {}
            for name, command in servers.COMMANDS[kind].items():
                why = servers.missing(kind, name, self.floor)
                if why:
                    self.note(f"left out: {why}")
                    continue
                try:
                    place = stack.enter_context(self.place(kind, name))
                    server = stack.enter_context(servers.running(name, kind, command, place))
                    if self.load:
                        loads.verify(self.load, self.plan.load_core, server)
                    alive[name] = server
                except BenchError as error:
                    self.note(f"left out: {kind}: {error}")
            if kind in {"file", "direct"}:
                os.sync()  # else what was filled is written back under the measurements
            for number, case in enumerate(cases, 1):
                say(f"{kind} {number}/{len(cases)}: {case.name}")
                self.measure_case(case, alive)
            for name, server in alive.items():
                self.results.memory[f"{kind}/{name}"] = server.resident_bytes()
            if kind == "memory" and self.plan.idle_seconds and self.load:
                self.measure_idle(list(alive.values()))

    @contextlib.contextmanager
    def place(self, kind: str, name: str) -> Iterator[Place]:
        """Make a folder and an image for a server; both are gone afterwards."""
        home = SHARED_MEMORY if kind == "memory" else self.plan.directory
        with tempfile.NamedTemporaryFile(prefix="nbd-bench-", dir=home) as image:
            image.truncate(self.plan.size)
            folder = self.work / f"{kind}-{name}"
            yield Place(folder, Path(image.name), self.plan.size, self.plan.server_core, self.floor)

    def measure_case(self, case: Case, alive: dict[str, Server]) -> None:
        """Load every server in turn, and that several times."""
        names = list(alive)
        if case.kind == "direct" and shutil.which("fio") and servers.OURS in alive:
            names += servers.NATIVE_ENGINES
        rows = {name: Row(case, name) for name in names}
        self.results.rows += rows.values()
        for _ in range(self.plan.repetitions):
            for name in names:
                try:
                    rows[name].add(self.measure_once(case, name, alive))
                except BenchError as error:
                    self.note(f"{case.name}: {name}: {error}")
        if self.count is None or case.load == "fio":
            return
        for name, server in alive.items():
            try:
                rows[name].syscalls = self.count_syscalls(case, server)
            except (BenchError, OSError, subprocess.TimeoutExpired) as error:
                self.note(f"{case.name}: {name}: system calls: {error}")

    def measure_once(self, case: Case, name: str, alive: dict[str, Server]) -> loads.Measures:
        """Load one server once."""
        plan, point = self.plan, case.point
        if name in servers.NATIVE_ENGINES:
            image = alive[servers.OURS].place.image
            target = [f"--ioengine={name.removeprefix('fio ')}", "--direct=1"]
            target += [f"--filename={image}", f"--size={plan.size}"]
            return loads.by_fio(plan.load_core, target, point, plan.seconds, None)
        server = alive[name]
        if case.load == "fio":
            target = ["--ioengine=nbd", f"--uri={server.uri}", f"--size={plan.size}"]
            return loads.by_fio(plan.load_core, target, point, plan.seconds, server.pid)
        assert self.load is not None
        apart = case.load == "apart"
        return loads.by_generator(
            self.load, plan.load_core, server, point, plan.seconds, apart=apart
        )

    def count_syscalls(self, case: Case, server: Server) -> float:
        """Count a server's system calls per request in a run of its own."""
        assert self.load is not None
        assert self.count is not None
        return loads.syscalls(
            self.load,
            self.plan.load_core,
            server,
            case.point,
            min(0.3, self.plan.seconds),
            self.count,
            apart=case.load == "apart",
        )

    def measure_idle(self, alive: Sequence[Server]) -> None:
        """See what each server costs with one client that asks for nothing."""
        assert self.load is not None
        say(f"idle: {self.plan.idle_seconds:g} s")
        with contextlib.ExitStack() as stack:
            for server in alive:
                stack.enter_context(loads.connected(self.load, self.plan.load_core, server, []))
            used = self.idle_cpu([server.pid for server in alive])
        for server, cpu in zip(alive, used, strict=True):
            self.results.idle[server.name] = cpu

    def measure_idle_disks(self) -> None:
        """See what many disks of ours cost, each with a client that asks for nothing."""
        assert self.load is not None
        name = f"{servers.OURS}, {IDLE_DISKS} disks"
        say(f"idle: {name}, {self.plan.idle_seconds:g} s")
        command = servers.idle_reactor(IDLE_DISKS)
        with contextlib.ExitStack() as stack:
            place = stack.enter_context(self.place("memory", "idle"))
            server = stack.enter_context(servers.running(servers.OURS, "memory", command, place))
            for number in range(IDLE_DISKS):
                path, export = Path(f"{place.socket}-{number}"), f"d{number}"
                client = loads.Generator(self.load, self.plan.load_core, path, export, [])
                stack.callback(client.close)
                client.await_ready()
            (self.results.idle[name],) = self.idle_cpu([server.pid])

    def idle_cpu(self, pids: Sequence[int]) -> list[float]:
        """Return the CPU seconds a second of each tree while nothing is asked for."""
        time.sleep(IDLE_SETTLING_SECONDS)
        before = [processes.cpu_seconds(pid) for pid in pids]
        time.sleep(self.plan.idle_seconds)
        after = [processes.cpu_seconds(pid) for pid in pids]
        return [
            (late - early) / self.plan.idle_seconds
            for early, late in zip(before, after, strict=True)
        ]


def say(text: str) -> None:
    """Tell the person who waits."""
    print(text, file=sys.stderr, flush=True)

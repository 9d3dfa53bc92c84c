"""Runs the cases: all servers of a kind at the same time, loaded in turn."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeAlias

import counts
import fairness
import loads
import processes
import profiling
import servers
from loads import Measures
from points import COUNTS, KINDS, Case
from results import Results, Row
from servers import BenchError, Place, Server

SHARED_MEMORY: Final = Path("/dev/shm")
IDLE_SETTLING_SECONDS: Final = 1.0  # after its last request a server may look for more
SYSCALLS_SECONDS: Final = 0.3
#: By program of ours, what the compiler is told beside the usual.
PROGRAMS: Final = {
    "load": (),
    "floor": (),
    "counting": ("-shared", "-fPIC", "-fno-builtin"),
}

#: What is loaded in turn, each by its name: measures it once.
Participants: TypeAlias = dict[str, Callable[[Case], Measures]]


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
        cases = [case for case in plan.cases if bench.can_load(case)]
        bench.to_do = len(cases)
        counted = [case for case in cases if case.kind == COUNTS]
        if counted:
            bench.count_syscalls(counted)
            bench.count_memory(counted)
        for kind in KINDS:
            of_kind = [case for case in cases if case.kind == kind]
            if of_kind:
                bench.measure_kind(kind, of_kind)
        if plan.idle_seconds and bench.load and any(case.kind == "memory" for case in cases):
            bench.measure_many_disks()


def profile(plan: Plan, case: Case) -> str:
    """Return where our server's CPU time goes at a case. Raises BenchError."""
    with tempfile.TemporaryDirectory(prefix="nbd-bench-") as work:
        bench = _Bench(plan, Results({}), Path(work))
        bench.build()
        if bench.load is None:
            raise BenchError("a profile needs our generator, and that a C compiler")
        command = servers.COMMANDS[case.kind][servers.OURS]
        with (
            bench.place(case.kind, servers.OURS) as place,
            servers.running(servers.OURS, case.kind, command, place) as server,
        ):
            loads.verify(bench.load, plan.load_core, server)
            return profiling.profile(bench.load, plan.load_core, server, case, Path(work))


class _Bench:
    def __init__(self, plan: Plan, results: Results, work: Path) -> None:
        self.plan = plan
        self.results = results
        self.work = work
        self.began = time.monotonic()
        self.to_do = 0
        self.done = 0
        self.programs: dict[str, Path] = {}
        counter = processes.syscall_counter()
        self.syscall_counter = counter[1] if counter else None
        results.about["syscalls_counted_by"] = counter[0] if counter else None
        if counter is None:
            self.note("system calls are not counted: needs perf or strace, and to be allowed it")

    def say(self, text: str) -> None:
        """Tell the person who waits."""
        print(text, file=sys.stderr, flush=True)

    def begin(self, text: str) -> None:
        """Say what comes next, and how far all is."""
        self.done += 1
        minutes, seconds = divmod(round(time.monotonic() - self.began), 60)
        self.say(f"[{self.done}/{self.to_do} after {minutes}:{seconds:02}] {text}")

    def note(self, text: str) -> None:
        """Tell once what is left out."""
        if text not in self.results.notes:
            self.results.notes.append(text)
            self.say(text)

    def build(self) -> None:
        """Compile our programs."""
        compiler = shutil.which("gcc") or shutil.which("cc")
        if compiler is None:
            self.note("no C compiler: only fio puts load on, and there is no floor")
            return
        for name, flags in PROGRAMS.items():
            program = self.work / name
            source = servers.HERE / f"{name}.c"
            command = [compiler, "-std=gnu11", "-O2", *flags, "-o", str(program), str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                self.note(f"{source.name} cannot be compiled: {done.stderr.strip()}")
            else:
                self.programs[name] = program

    @contextlib.contextmanager
    def going_on(self, what: str) -> Iterator[None]:
        """Note what does not work."""
        try:
            yield
        except (BenchError, OSError, subprocess.TimeoutExpired) as error:
            self.note(f"{what}: {error}")

    @property
    def load(self) -> Path | None:
        """Our generator, when it could be compiled."""
        return self.programs.get("load")

    def can_load(self, case: Case) -> bool:
        """Whether the program for a case's load is there."""
        if case.load != "fio":
            return self.load is not None
        if shutil.which("fio") is None:
            self.note("fio: not installed (Debian package fio)")
            return False
        if not loads.fio_speaks_nbd():
            self.note("fio: this build has no NBD client")
            return False
        return True

    @contextlib.contextmanager
    def place(self, kind: str, name: str) -> Iterator[Place]:
        """Make a folder and an image for a server; both are gone afterwards."""
        in_memory = kind in {COUNTS, "memory"}
        home = SHARED_MEMORY if in_memory else self.plan.directory
        with tempfile.NamedTemporaryFile(prefix="nbd-bench-", dir=home) as image:
            image.truncate(self.plan.size)
            yield Place(
                self.work / f"{kind}-{name}",
                Path(image.name),
                self.plan.size,
                self.plan.server_core,
                self.programs.get("floor"),
            )

    # --- what is counted ---

    def count_syscalls(self, cases: Sequence[Case]) -> None:
        """Count our server's system calls per request, on a core that it shares with the load."""
        counter, load = self.syscall_counter, self.load
        if counter is None or load is None:
            return
        with self.going_on("system calls"), self.counted("syscalls", {}) as server:
            for case in cases:
                found = counts.syscalls(load, server, case.point, counter)
                self.results.counts.setdefault(case.name, {}).update(found)

    def count_memory(self, cases: Sequence[Case]) -> None:
        """Count what our server allocates and copies for each request."""
        load, library = self.load, self.programs.get("counting")
        if load is None or library is None:
            return
        folder = self.work / "counts"
        folder.mkdir()
        counter = counts.MemoryCounter(library, folder)
        with (
            self.going_on("allocations and copies"),
            self.counted("memory", counter.environment) as server,
        ):
            counter.check()
            for case in cases:
                self.begin(case.name)
                found = counts.memory(load, server, case.point, counter)
                self.results.counts.setdefault(case.name, {}).update(found)

    @contextlib.contextmanager
    def counted(self, name: str, environment: dict[str, str]) -> Iterator[Server]:
        """Run our server for counting, its disk filled so that no request has to make memory."""
        assert self.load is not None
        command = servers.COUNTED
        with (
            self.place(COUNTS, name) as place,
            servers.running(servers.OURS, "memory", command, place, environment) as server,
        ):
            loads.verify(self.load, place.core, server)
            yield server

    # --- what is measured ---

    def measure_kind(self, kind: str, cases: Sequence[Case]) -> None:
        """Run the cases of one kind of disk."""
        with contextlib.ExitStack() as stack:
            alive = self.start(kind, stack)
            participants: Participants = {
                name: partial(self.load_server, server) for name, server in alive.items()
            }
            if kind == "direct" and shutil.which("fio") and servers.OURS in alive:
                image = alive[servers.OURS].place.image
                for engine in servers.NATIVE_ENGINES:
                    participants[engine] = partial(self.load_image, engine, image)
            if kind in {"file", "direct"}:
                os.sync()  # else what was filled is written back under the measurements
            for case in cases:
                self.begin(case.name)
                self.measure_case(case, participants)
                self.count_case(case, {name: alive[name] for name in participants if name in alive})
            living = [server for name, server in alive.items() if name in participants]
            for server in living:
                self.results.memory[f"{kind}/{server.name}"] = server.resident_bytes()
            if kind == "memory" and self.plan.idle_seconds and self.load:
                self.measure_idle(living)

    def start(self, kind: str, stack: contextlib.ExitStack) -> dict[str, Server]:
        """Start the servers of a kind; returns those that serve."""
        alive = {}
        for name, command in servers.COMMANDS[kind].items():
            why = servers.missing(kind, name, self.programs.get("floor"))
            if why:
                self.note(f"left out: {why}")
                continue
            try:
                place = stack.enter_context(self.place(kind, name))
                server = stack.enter_context(servers.running(name, kind, command, place))
                if self.load:
                    loads.verify(self.load, self.plan.load_core, server)
                alive[name] = server
            except (BenchError, OSError) as error:
                self.note(f"left out: {kind}: {name}: {str(error).removeprefix(f'{name}: ')}")
        return alive

    def measure_case(self, case: Case, participants: Participants) -> None:
        """Load everyone in turn, and that several times; drops who fails."""
        rows = {name: Row(case, name) for name in participants}
        self.results.rows += rows.values()
        for _ in range(self.plan.repetitions):
            for name, load in list(participants.items()):
                try:
                    rows[name].add(load(case))
                except BenchError as error:
                    del participants[name]
                    self.note(f"{case.name}: {name}: {error}; left out from here on")

    def load_server(self, server: Server, case: Case) -> Measures:
        """Load one server once."""
        measured = self._load_server(server, case)
        if not processes.tree(server.pid):  # its children may serve on, but cost nothing here
            raise BenchError("it has died")
        return measured

    def _load_server(self, server: Server, case: Case) -> Measures:
        plan = self.plan
        if case.load == "fio":
            target = ["--ioengine=nbd", f"--uri={server.uri}", f"--size={plan.size}"]
            return loads.by_fio(plan.load_core, target, case.point, plan.seconds, server.pid)
        assert self.load is not None
        apart = case.load == "apart"
        return loads.by_generator(
            self.load, plan.load_core, server, case.point, plan.seconds, apart=apart
        )

    def load_image(self, engine: str, image: Path, case: Case) -> Measures:
        """Load a file itself once, past the page cache."""
        plan = self.plan
        target = [f"--ioengine={engine.removeprefix('fio ')}", "--direct=1"]
        target += [f"--filename={image}", f"--size={plan.size}"]
        return loads.by_fio(plan.load_core, target, case.point, plan.seconds, None)

    def count_case(self, case: Case, alive: dict[str, Server]) -> None:
        """Count each server's system calls per request in a run of its own."""
        counter, load = self.syscall_counter, self.load
        if counter is None or load is None or case.load == "fio":
            return
        seconds = min(SYSCALLS_SECONDS, self.plan.seconds)
        options = loads.options_of(case.point, f"--seconds={seconds}", apart=case.load == "apart")
        for row in self.results.at(case).values():
            if row.server not in alive:
                continue
            with self.going_on(f"{case.name}: {row.server}: system calls"):
                row.syscalls = loads.syscalls(
                    load, self.plan.load_core, alive[row.server], options, counter
                )

    # --- what rests ---

    def measure_idle(self, alive: Sequence[Server]) -> None:
        """See what each server costs with one client that asks for nothing."""
        assert self.load is not None
        self.say(f"idle: {self.plan.idle_seconds:g} s")
        with self.going_on("idle"), contextlib.ExitStack() as stack:
            for server in alive:
                stack.enter_context(loads.connected(self.load, self.plan.load_core, server, []))
            self.watch_idle({server.name: server.pid for server in alive})

    def measure_many_disks(self) -> None:
        """See what many disks of ours cost at rest, and what a quiet one feels of busy ones."""
        assert self.load is not None
        self.say(f"idle: {servers.MANY}, {self.plan.idle_seconds:g} s")
        command = servers.reactor_with_many_disks
        with self.going_on(f"idle: {servers.MANY}"), contextlib.ExitStack() as stack:
            place = stack.enter_context(self.place("memory", "idle"))
            server = stack.enter_context(servers.running(servers.OURS, "memory", command, place))
            for number in range(servers.MANY_DISKS):
                path, export = Path(f"{place.socket}-{number}"), f"d{number}"
                client = loads.Generator(self.load, self.plan.load_core, path, export, [])
                stack.callback(client.close)
                client.await_ready()
            self.watch_idle({servers.MANY: server.pid})
            self.results.memory[f"memory/{servers.MANY}"] = server.resident_bytes()
            self.say("a quiet disk beside busy ones")
            self.results.fairness = fairness.measure_fairness(
                self.load, self.plan.load_core, server, self.plan.seconds
            )

    def watch_idle(self, pids: Mapping[str, int]) -> None:
        """See what CPU each server's tree uses while nothing is asked for."""
        time.sleep(IDLE_SETTLING_SECONDS)
        before = {name: processes.cpu_seconds_of_each(pid) for name, pid in pids.items()}
        time.sleep(self.plan.idle_seconds)
        for name, pid in pids.items():
            after = processes.cpu_seconds_of_each(pid)
            if not after:
                self.note(f"idle: {name}: it has died")
                continue
            used = [
                (seconds - before[name].get(each, 0.0)) / self.plan.idle_seconds
                for each, seconds in after.items()
            ]
            self.results.idle[name] = sum(used)
            self.results.idle_busiest[name] = max(used)

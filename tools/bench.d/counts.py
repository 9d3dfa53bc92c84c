"""Counts what a request costs our server: the same on any machine, so that a build may fail by it.

In `interrupt` mode, with server and load on one core, they take turns: how fast each is, and how
long the loop would look for more work, counts for nothing.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import loads
import processes
from loads import Measures
from points import Point
from servers import BenchError, Server

#: In the order of counting.c.
COUNTERS: Final = ("allocations", "large allocations", "copies", "copied bytes")
READING: Final = struct.Struct(f"={len(COUNTERS)}Q")
#: The load of one run: as much as it takes until all is in its steady state.
RUN_BYTES: Final = 64 << 20
RUN_REQUESTS_MAX: Final = 4096
#: What a heartbeat adds, and a batch that the load was kept from sending whole, is no request's.
SYSCALL_RUNS: Final = 5
PATIENCE_SECONDS: Final = 60.0
#: Makes as many copies of 4 KiB, and as many objects, as its arguments say.
KNOWN_PROGRAM: Final = """
import sys
from itertools import repeat
copies, objects = map(int, sys.argv[1:])
to, data = memoryview(bytearray(4096)), bytes(4096)
for _ in repeat(None, copies):
    to[:] = data
kept = [object() for _ in repeat(None, objects)]
"""


@dataclass(frozen=True)
class MemoryCounter:
    """Counts in the processes that are started with its `environment`."""

    library: Path
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        """What makes a process count."""
        folder = str(self.folder)
        return {"LD_PRELOAD": str(self.library), "COUNTS": folder, "PYTHONMALLOC": "malloc"}

    def read(self, pid: int) -> dict[str, int]:
        """Return the counts of a process since its start."""
        try:
            found = READING.unpack((self.folder / str(pid)).read_bytes())
        except (OSError, struct.error) as error:
            raise BenchError(f"process {pid} did not count: {error}") from error
        return dict(zip(COUNTERS, found, strict=True))

    def check(self) -> None:
        """Let it count what is known; raises BenchError when it sees anything else."""
        neither, copies, objects = (self._known(*n) for n in ((5, 5), (2005, 5), (5, 2005)))
        copied = copies["copied bytes"] - neither["copied bytes"]
        made = objects["allocations"] - neither["allocations"]
        # The list of the objects grows a few times.
        if copied != 2000 * 4096 or not 2000 <= made <= 2100:
            raise BenchError(f"saw {copied} bytes of {2000 * 4096} and {made} objects of 2000")

    def _known(self, copies: int, objects: int) -> dict[str, int]:
        with subprocess.Popen(
            [sys.executable, "-c", KNOWN_PROGRAM, str(copies), str(objects)],
            env={**os.environ, **self.environment},
        ) as program:
            program.wait(PATIENCE_SECONDS)
        return self.read(program.pid)


def requests_of(point: Point) -> int:
    """Return how many requests one run has, a multiple of the depth."""
    return min(RUN_REQUESTS_MAX, RUN_BYTES // point.bytes) // point.depth * point.depth


def syscalls(load: Path, server: Server, point: Point, count: processes.SyscallCounter) -> Measures:
    """Return a request's system calls: those of the run with the fewest."""
    options = loads.options_of(point, f"--requests={requests_of(point)}")
    runs = (
        loads.syscalls(load, server.place.core, server, options, count) for _ in range(SYSCALL_RUNS)
    )
    return {"syscalls": min(runs)}


def memory(load: Path, server: Server, point: Point, counter: MemoryCounter) -> Measures:
    """Return what a request allocates and copies, in user space."""
    _controller, worker = processes.tree(server.pid)
    once, twice = (
        _counted(load, server, worker.pid, counter, point, times * requests_of(point))
        for times in (1, 2)
    )
    # The difference, as what begins and ends a run is no request's.
    each = {name: max(0, twice[name] - once[name]) / requests_of(point) for name in COUNTERS}
    each["copies"] = each.pop("copied bytes") / point.bytes
    return each


def _counted(
    load: Path, server: Server, pid: int, counter: MemoryCounter, point: Point, requests: int
) -> dict[str, int]:
    options = loads.options_of(point, f"--requests={requests}")
    with loads.connected(load, server.place.core, server, options) as generator:
        before = counter.read(pid)
        generator.run(PATIENCE_SECONDS)
        after = counter.read(pid)
    return {name: after[name] - before[name] for name in COUNTERS}

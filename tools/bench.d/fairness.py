"""What a quiet disk feels of its busy neighbours on the same worker."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from loads import Generator, Measures
from servers import EMPTY_DISK, Server

#: What the neighbours do: the generator's options for each, by the number of its disk.
NEIGHBOURS: Final[Mapping[str, Mapping[int, list[str]]]] = {
    "alone": {},
    "a writer, 128 x 4 KiB": {1: ["--reads=0", "--depth=128"]},
    "a writer, 128 x 128 KiB": {1: ["--reads=0", "--depth=128", "--bytes=131072"]},
    "8 writers, 32 x 4 KiB": {disk: ["--reads=0", "--depth=32"] for disk in range(1, 9)},
    "a writer, 128 x 4 KiB, mostly to new memory": {EMPTY_DISK: ["--reads=0", "--depth=128"]},
    "a reader, 32 x 1 MiB, where mostly nothing was written": {
        EMPTY_DISK: ["--depth=32", f"--bytes={1 << 20}"]
    },
}
SETTLING: Final = 0.2  # of the time, before and after, when only the neighbours are busy


def measure_fairness(
    program: Path, core: int, server: Server, seconds: float
) -> dict[str, Measures]:
    """Return the requests and latencies in us of a reader of 4 KiB at depth 1, by neighbours.

    `server` runs `servers.reactor_with_many_disks`: all its disks belong to one worker. Raises
    BenchError when the reader or a neighbour fails.
    """
    return {
        name: _read_beside(program, core, server, options, seconds)
        for name, options in NEIGHBOURS.items()
    }


def _read_beside(
    program: Path, core: int, server: Server, neighbours: Mapping[int, list[str]], seconds: float
) -> Measures:
    def connect(number: int, options: list[str]) -> Generator:
        path = Path(f"{server.place.socket}-{number}")
        generator = Generator(program, core, path, f"d{number}", options)
        stack.callback(generator.close)
        generator.await_ready()
        return generator

    with contextlib.ExitStack() as stack:
        reader = connect(0, [f"--seconds={seconds}"])
        if os.geteuid() == 0:  # or what it waits for would be its core, which all loads share
            os.sched_setscheduler(reader.pid, os.SCHED_FIFO, os.sched_param(1))
        busy = seconds * (1 + 2 * SETTLING)
        writers = [
            connect(number, [*options, f"--seconds={busy}"])
            for number, options in neighbours.items()
        ]
        with ThreadPoolExecutor(len(writers) + 1) as pool:
            written = [pool.submit(writer.run, busy) for writer in writers]
            time.sleep(seconds * SETTLING)
            told = reader.run(seconds)
        for each in written:
            each.result()
    return {name: told[name] for name in ("requests", "p50_us", "p99_us", "p99.9_us")}

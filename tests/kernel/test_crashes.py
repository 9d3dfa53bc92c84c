"""Any process dies at any moment: nothing that was acknowledged is lost, and nobody sees an error.

Ten crashes by default, 50 with NBD_REACTOR_CRASHES=50 (six minutes). Which they are, in what order
and when follows from the seed that is told.
"""

from __future__ import annotations

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import pytest

from reactor import __version__
from tests.applications import (
    Application,
    Reader,
    Verifier,
    await_all,
    busy,
    no_io_error,
    writing_to_ext4,
)
from tests.commands import attached
from tests.conftest import SEED
from tests.crashing import CrashingService, strikes
from tests.running import STOP_SECONDS, RunningService, copy_program

CRASHES = int(os.environ.get("NBD_REACTOR_CRASHES", "10"))
RESTARTS = 4
OVERCOME_SECONDS = 120.0
NEXT_VERSION = "999.0.0"

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300 + 20 * CRASHES)]
Start = Callable[..., RunningService]
Tell = Callable[[str], None]

FIO = ("/dev/nbd0", "/dev/nbd1")
EXT4 = ("/dev/nbd2", "/dev/nbd3")


def config(folder: Path) -> str:
    return f"""
disks:
  ram: {{backend: malloc, size: 16MiB, device: /dev/nbd0}}
  file: {{backend: file, path: {folder}/image, size: 16MiB, device: /dev/nbd1}}
  ram-fs: {{backend: malloc, size: 48MiB, device: /dev/nbd2}}
  file-fs: {{backend: file, path: {folder}/image-fs, size: 48MiB, device: /dev/nbd3}}
"""


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Tell:
    """Write a line for whoever runs the tests, whatever their outcome."""
    reporter = request.config.pluginmanager.getplugin("terminalreporter")

    def tell(line: str) -> None:
        with capsys.disabled():
            reporter.ensure_newline()
            reporter.write_line(line)

    return tell


class Stalls:
    """How long applications waited, in seconds, by what had happened."""

    def __init__(self) -> None:
        self._seconds: dict[str, list[float]] = defaultdict(list)

    def add(self, kind: str, seconds: float) -> None:
        self._seconds[kind].append(seconds)

    def lines(self) -> Iterator[str]:
        for kind, seconds in sorted(self._seconds.items()):
            median, worst = statistics.median(seconds), max(seconds)
            yield f"{kind}: {len(seconds)} times, median {median:.1f} s, worst {worst:.1f} s"


@contextmanager
def applications(folder: Path) -> Iterator[list[Application]]:
    """Applications on all four disks; yields those whose stalls count."""
    mounts = {device: folder / f"mount{number}" for number, device in enumerate(EXT4)}
    with no_io_error(), writing_to_ext4(mounts) as writers:
        readers = [Reader(device) for device in FIO]
        with busy([*readers, *writers, *map(Verifier, FIO)]):
            await_all([*readers, *writers], OVERCOME_SECONDS)
            yield [*readers, *writers]


def longest_stall(observers: Sequence[Application], began: float) -> float:
    """Wait until all have gone on; returns for how long one of them waited at most."""
    await_all(observers, OVERCOME_SECONDS)
    return max(observer.stall(began) for observer in observers)


def test_crashes_are_not_noticed(service: Start, tmp_path: Path, tell: Tell) -> None:
    disks, runtime_dir = config(tmp_path), tmp_path / "run"
    crashing = CrashingService(lambda: service(disks, runtime_dir=runtime_dir, await_ready=False))
    crashing.running.await_line("ready:")
    stalls = Stalls()
    planned = strikes(CRASHES, SEED)
    tell(f"NBD_REACTOR_SEED={SEED} NBD_REACTOR_CRASHES={CRASHES}")
    with applications(tmp_path) as observers:
        began = time.monotonic()
        for strike, following in zip(planned, [*planned[1:], None], strict=True):
            time.sleep(strike.pause)
            if not strike.hasty:
                began = time.monotonic()
            crashing.strike(strike.kind)
            if following is not None and following.hasty:
                continue
            crashing.await_overcome(OVERCOME_SECONDS)
            kind = "several in a row" if strike.hasty else strike.kind
            stalls.add(kind, longest_stall(observers, began))
    check_stop(crashing.running)
    for line in stalls.lines():
        tell(line)


def test_sixteen_disks_of_a_killed_worker(service: Start, tell: Tell) -> None:
    lines = "".join(f"  d{n}: {{backend: malloc, size: 4MiB, device: auto}}\n" for n in range(16))
    crashing = CrashingService(lambda: service(f"disks:\n{lines}"))
    devices = [disk["device"] for disk in crashing.running.rpc("reactor_get_disks")]
    readers, stalls = [Reader(device) for device in devices], Stalls()
    with no_io_error(), busy(readers):
        for _ in range(3):
            await_all(readers, OVERCOME_SECONDS)
            began = time.monotonic()
            crashing.strike("worker killed")
            crashing.await_overcome(OVERCOME_SECONDS)
            await_all(readers, OVERCOME_SECONDS)
            for reader in readers:
                stalls.add("one of 16 disks, worker killed", reader.stall(began))
    for line in stalls.lines():
        tell(line)


def test_restarts_that_keep_the_devices(service: Start, tmp_path: Path, tell: Tell) -> None:
    disks, stalls, keep = config(tmp_path), Stalls(), ("--on-exit", "keep")
    running = service(disks, *keep)
    with applications(tmp_path) as observers:
        for options in (*[keep] * (RESTARTS - 1), ()):
            began = time.monotonic()
            running.process.terminate()
            assert running.process.wait(STOP_SECONDS) == 0, running.log
            running = service(disks, *options, runtime_dir=running.runtime_dir)
            stalls.add("restarted with --on-exit keep", longest_stall(observers, began))
    check_stop(running)
    for line in stalls.lines():
        tell(line)


def test_another_version_takes_over(service: Start, tmp_path: Path, tell: Tell) -> None:
    """What follows a controller that died may be a newer version, or an older one again."""
    disks, stalls = config(tmp_path), Stalls()
    running = service(disks)
    with applications(tmp_path) as observers:
        for program in (next_version(tmp_path / "next"), None):
            began = time.monotonic()
            running.process.kill()
            running.process.wait()
            running = service(disks, runtime_dir=running.runtime_dir, program=program)
            running.await_true(partial(all_run_from, running, program))
            stalls.add("another version started", longest_stall(observers, began))
            version = running.rpc("reactor_get_status")["version"]
            assert version == (NEXT_VERSION if program else __version__)
    check_stop(running)
    for line in stalls.lines():
        tell(line)


def next_version(folder: Path) -> Path:
    """Make a copy of the program that has another version; returns where it is."""
    copy_program(folder)
    (folder / "reactor" / "__init__.py").write_text(f'__version__ = "{NEXT_VERSION}"\n')
    return folder


def all_run_from(running: RunningService, program: Path | None) -> bool:
    """Whether every worker is a process of this copy of the program, and all disks are online."""
    states = {disk["state"] for disk in running.rpc("reactor_get_disks")}
    try:
        places = {worker.cwd() for worker in running.workers().values()}
    except psutil.NoSuchProcess:  # it has just been replaced
        return False
    return states == {"online"} and places == {str(program or Path.cwd())}


def check_stop(running: RunningService) -> None:
    assert running.stop() == 0
    assert not any(attached(device) for device in (*FIO, *EXT4))

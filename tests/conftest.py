"""What holds for every test: reproducible randomness, and nothing left behind."""

from __future__ import annotations

import os
import platform
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hypothesis import settings

from tests.running import RunningService

SEED = int(os.environ.get("NBD_REACTOR_SEED") or random.SystemRandom().getrandbits(32))
SETTLING_SECONDS = 5.0  # what is ending when a test returns may end

# Tests assert no times; a slow machine is no failure.
settings.register_profile("default", deadline=None, print_blob=True)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_report_header() -> str:
    """Say what is under test and how to repeat the run."""
    return f"kernel: {platform.release()}; repeat with NBD_REACTOR_SEED={SEED}"


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    random.seed(SEED ^ zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = _held()
    yield
    deadline = time.monotonic() + SETTLING_SECONDS
    while (leaked := _unclaimed(_held() - before)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not leaked, "left behind: " + ", ".join(sorted(leaked))


def _held() -> set[str]:
    return {
        *_descriptors(),
        *_threads(),
        *_children(),
        *_orphans(),
        *_shared_memory(),
        *_devices(),
    }


def _descriptors() -> Iterator[str]:
    for fd in Path("/proc/self/fd").iterdir():
        try:
            yield f"descriptor {fd.name} of {fd.readlink()}"
        except FileNotFoundError:  # the one that listed them
            continue


def _threads() -> Iterator[str]:
    return (f"thread {thread.name}" for thread in threading.enumerate())


def _children() -> Iterator[str]:
    for child in psutil.Process().children(recursive=True):
        try:
            yield f"process {child.pid} {' '.join(child.cmdline())}"
        except psutil.NoSuchProcess:
            continue
        except psutil.ZombieProcess:
            yield f"zombie {child.pid}"


def _orphans() -> Iterator[str]:
    """Name the workers that outlived their controller: they are nobody's children any more."""
    for process in psutil.process_iter(["ppid", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if process.info["ppid"] == 1 and title.startswith("nbd-reactor: worker"):
            yield f"process {process.pid} {title}"


def _shared_memory() -> Iterator[str]:
    return (str(path) for path in Path("/dev/shm").glob("nbd-reactor-*"))


def _unclaimed(leaked: set[str]) -> set[str]:
    """Leave out the memory that a process maps: it is another service's, not this test's."""
    memory = {name for name in leaked if name.startswith("/dev/shm/")}
    for maps in Path("/proc").glob("[0-9]*/maps") if memory else ():
        try:
            text = maps.read_text()
        except OSError:  # the process ended
            continue
        leaked = leaked - {name for name in memory if name in text}
    return leaked


def _devices() -> Iterator[str]:
    return (f"attached {path.parent}" for path in Path("/sys/block").glob("nbd*/pid"))


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., RunningService]]:
    """A factory of running services; each is stopped, and must stop cleanly, at the end."""
    started: list[RunningService] = []

    def start(
        config: str | None = None, *arguments: str, await_ready: bool = True, **settings: object
    ) -> RunningService:
        running = RunningService(tmp_path / f"s{len(started)}", config, *arguments, **settings)
        started.append(running)
        if await_ready:
            running.await_line("ready:")
        return running

    yield start
    for running in reversed(started):
        running.stop()

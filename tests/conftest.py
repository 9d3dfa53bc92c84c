"""What holds for every test: reproducible randomness, and nothing left behind."""

from __future__ import annotations

import os
import platform
import random
import re
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

# The memory of a disk of a service, which has 8 random digits for its name.
SERVICE_MEMORY = re.compile(r"/dev/shm/nbd-reactor-([0-9a-f]{8})-")

OURS = ("nbd-reactor: worker", "nbd-reactor: device I/O")

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
def _no_leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    ours = tmp_path_factory.getbasetemp()
    before = _held()
    yield
    deadline = time.monotonic() + SETTLING_SECONDS
    while (leaked := _unclaimed(_held() - before, ours)) and time.monotonic() < deadline:
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
    """Name the processes that outlived their controller: they are nobody's children any more."""
    for process in psutil.process_iter(["ppid", "cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if process.info["ppid"] == 1 and title.startswith(OURS):
            yield f"process {process.pid} {title}"


def _shared_memory() -> Iterator[str]:
    return (str(path) for path in Path("/dev/shm").glob("nbd-reactor-*"))


def _unclaimed(leaked: set[str], ours: Path) -> set[str]:
    """Leave out the memory of services that run beside the tests.

    It is a service's of ours if the name of its instance is in a runtime directory below `ours`;
    what a test names itself, without a service, is ours too.
    """
    names = {name: match[1] for name in leaked if (match := SERVICE_MEMORY.match(name))}
    if not names:
        return leaked
    instances = {path.read_text().strip() for path in ours.rglob("instance")}
    return leaked - {name for name, instance in names.items() if instance not in instances}


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
    try:
        for running in reversed(started):
            running.stop()
    finally:
        for running in started:  # pytest shows it when the test has failed
            print(running.log_path, running.log, sep="\n")  # noqa: T201

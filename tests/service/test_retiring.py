"""The next controller has other cores: workers of those it has not end in their time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.running import RunningService
from tests.service.memory_disks import nbdsh, ram

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")

Start = Callable[..., RunningService]
CORES = sorted(os.sched_getaffinity(0))[:2]
STAYS, LEAVES = CORES[0], CORES[-1]


def config(tmp_path: Path) -> str:
    """Return one of a disk on each core, and one on both."""
    more = f", core: {STAYS}"
    wide = f"  w: {{backend: malloc, size: 8MiB, connections: 2, listen: 'unix:{tmp_path}/w.sock'}}"
    return ram(tmp_path, "stays", more=more) + ram(tmp_path, "moves")[len("disks:\n") :] + wide


@contextmanager
def silent_worker(service: Start, tmp_path: Path) -> Iterator[tuple[Path, psutil.Process]]:
    """Yield a runtime directory with two living workers, one of which does not answer."""
    running = service(config(tmp_path), cores=",".join(map(str, CORES)))
    placed = {disk["name"]: disk["cores"] for disk in running.rpc("reactor_get_disks")}
    assert placed["moves"] == [LEAVES]
    assert sorted(placed["w"]) == CORES
    for name in placed:
        nbdsh(tmp_path, name, "h.pwrite(b'r' * 4096, 0); h.flush()")
    worker = running.workers()[LEAVES]
    running.process.kill()
    running.process.wait()
    worker.suspend()
    yield running.runtime_dir, worker


def stopped(process: psutil.Process) -> bool:
    return process.is_running() and process.status() == psutil.STATUS_STOPPED


def check_data(tmp_path: Path, *names: str) -> None:
    for name in names:
        nbdsh(tmp_path, name, "assert h.pread(4096, 0) == b'r' * 4096")


def test_a_worker_that_does_not_end_holds_up_its_own_disks_alone(
    service: Start, tmp_path: Path
) -> None:
    with silent_worker(service, tmp_path) as (runtime_dir, worker):
        after = service(
            config(tmp_path), cores=str(STAYS), runtime_dir=runtime_dir, await_ready=False
        )
        after.await_line("the core is not ours now")
        after.await_state("stays", "online")
        check_data(tmp_path, "stays")
        for name in ("moves", "w"):
            disk = after.rpc("reactor_get_disks", name=name)[0]
            waits = f"waits for the end of the worker of core {LEAVES}, which may have it open"
            assert (disk["state"], disk["reason"]) == ("starting", waits)
        assert stopped(worker)
        worker.resume()
        after.await_line("ready: 3 of 3 disks")
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    assert "is killed" not in after.log
    check_data(tmp_path, "stays", "moves", "w")


def test_a_worker_that_never_answers_is_killed_and_its_disks_come_back(
    service: Start, tmp_path: Path
) -> None:
    with silent_worker(service, tmp_path) as (runtime_dir, _):
        after = service(config(tmp_path), cores=str(STAYS), runtime_dir=runtime_dir)
        assert f"worker core {LEAVES}" in after.await_line("is killed")
    check_data(tmp_path, "stays", "moves", "w")


@pytest.mark.parametrize("lost", ["missing", "outdated"])
def test_every_disk_waits_when_nothing_tells_who_has_it(
    service: Start, tmp_path: Path, lost: str
) -> None:
    with silent_worker(service, tmp_path) as (runtime_dir, worker):
        state = runtime_dir / "state.json"
        if lost == "missing":
            state.unlink()
        else:
            state.rename(runtime_dir / "state-outdated.json")
        arguments = {"cores": str(STAYS), "runtime_dir": runtime_dir, "await_ready": False}
        after = service(f"{config(tmp_path)}\n  new: {{backend: malloc, size: 1MiB}}", **arguments)
        after.await_line("what ran before is not fully known")
        assert after.await_state("new", "starting")["reason"].startswith("waits for the end")
        assert stopped(worker)
        worker.resume()
        after.await_line("ready: 4 of 4 disks")
    assert state.exists()
    assert not (runtime_dir / "state-outdated.json").exists()
    check_data(tmp_path, "stays", "moves", "w")

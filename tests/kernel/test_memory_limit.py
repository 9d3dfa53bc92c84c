"""A worker that may not have the memory that it needs: a cgroup's limit ends it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.commands import fio_verify_command, run
from tests.kernel.test_slow_medium import working
from tests.running import RunningService

MIB = 1 << 20
LIMIT = 8 * MIB  # for what the worker takes from now on: far less than is written to its disk

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(240)]
Start = Callable[..., RunningService]


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Path]:
    """Make a cgroup that has little memory."""
    root = tmp_path / "cgroup"
    root.mkdir()
    run("mount", "-t", "cgroup2", "none", str(root))
    try:
        if "memory" not in (root / "cgroup.controllers").read_text().split():
            pytest.skip("the kernel's cgroups do not limit memory")
        (root / "cgroup.subtree_control").write_text("+memory")
        group = root / "little"
        group.mkdir()
        (group / "memory.max").write_text(str(LIMIT))
        yield group
        group.rmdir()
    finally:
        run("umount", str(root))


def kills(group: Path) -> int:
    events = dict(line.split() for line in (group / "memory.events").read_text().splitlines())
    return int(events["oom_kill"])


def test_a_worker_that_its_cgroup_kills_is_replaced(
    limited: Path, service: Start, tmp_path: Path
) -> None:
    running = service("disks: {m: {backend: malloc, size: 64MiB, device: /dev/nbd0}}")
    worker = running.workers()[0]
    # The OOM killer spares workers while there is another to end; in this group there is none.
    (limited / "cgroup.procs").write_text(str(worker.pid))
    with working(fio_verify_command("/dev/nbd0", "32M", rw="write", fsync="16")):
        running.await_line("was ended by signal 9")
    assert kills(limited) == 1
    assert running.await_state("m", "online")["reason"] == ""
    assert running.rpc("reactor_get_workers")[0]["restarts"] == 1
    assert running.stop() == 0

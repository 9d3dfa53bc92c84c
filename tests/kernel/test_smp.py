"""Several cores: one worker each, disks spread over them, all busy at the same time."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

from tests.commands import fio_verify_command
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, pytest.mark.smp]

CORES = (0, 1, 2, 3)


@pytest.mark.timeout(900)
def test_four_workers_serve_four_disks_at_once(service: Callable[..., RunningService]) -> None:
    disks = "".join(
        f"  disk{n}: {{backend: malloc, size: 16MiB, device: /dev/nbd{n}}}\n" for n in CORES
    )
    running = service(f"disks:\n{disks}", cores="0-3")
    workers = running.workers()
    assert tuple(workers) == CORES
    for core, worker in workers.items():
        assert worker.cpu_affinity() == [core]
        assert worker.cmdline()[0].startswith(f"nbd-reactor: worker core {core}")
    placed = {disk["core"] for disk in running.rpc("reactor_get_disks")}
    assert placed == set(CORES), "every worker has one disk"
    fio = [
        subprocess.Popen(
            fio_verify_command(f"/dev/nbd{n}", "4M"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for n in CORES
    ]
    for process in fio:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output.decode()

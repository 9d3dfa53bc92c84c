"""A device whose connections are spread over the workers of all CPUs; the driver's side of it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import attached, fio_verify_command, run
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(900)]
Start = Callable[..., RunningService]

MIB = 1 << 20
CORES = [0, 1, 2, 3]
QUEUE = Path("/sys/block/nbd0/queue")
smp = pytest.mark.smp


def wide(tmp_path: Path, backend: str, more: str = "") -> str:
    """Return a config of one disk of 64 MiB with four connections."""
    keys = {"malloc": "", "file": f", path: {tmp_path}/image"}[backend]
    return (
        f"disks:\n  w: {{backend: {backend}{keys}, size: 64MiB, device: /dev/nbd0,"
        f" connections: 4{more}}}\n"
    )


def read_from(cpu: int, block: int = 0) -> list[str]:
    dd = ["dd", "if=/dev/nbd0", "of=/dev/null", "iflag=direct", "bs=4k", "count=1"]
    return ["taskset", "-c", str(cpu), *dd, f"skip={block}"]


@contextmanager
def verifying_from_all_cpus(*, loops: int) -> Iterator[subprocess.Popen[bytes]]:
    command = fio_verify_command("/dev/nbd0", "8M", loops=str(loops))
    command += ["--numjobs=4", "--offset_increment=8M", "--cpus_allowed=0-3"]
    command += ["--cpus_allowed_policy=split", "--thread"]
    fio = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        yield fio
    finally:
        fio.kill()
        fio.communicate()


def check_verified(fio: subprocess.Popen[bytes]) -> None:
    output, _ = fio.communicate(timeout=600)
    assert fio.returncode == 0, output.decode()


def kill(running: RunningService, *cores: int) -> None:
    """Kill these workers, and wait until others are in their place and serve."""
    old = running.workers()
    for core in cores:
        old[core].kill()
    reads = 0
    spared = next(core for core in CORES if core not in cores)

    def replaced() -> bool:
        nonlocal reads
        run(*read_from(spared, reads))
        reads += 1
        now = running.workers()
        return all(now.get(core, old[core]) != old[core] for core in cores)

    running.await_true(replaced)
    assert reads, "a reader on another CPU goes on"
    running.await_state("w", "online")


def check_each_cpu_has_its_own_worker(running: RunningService) -> None:
    assert sorted(running.await_state("w", "online")["cores"]) == CORES
    for core, worker in running.workers().items():
        worker.suspend()
        try:
            for cpu in CORES:
                if cpu != core:
                    run(*read_from(cpu, core))
            waiting = subprocess.Popen(read_from(core, core), stderr=subprocess.DEVNULL)
            with pytest.raises(subprocess.TimeoutExpired):
                waiting.wait(2)
        finally:
            worker.resume()
        assert waiting.wait(60) == 0


def check_each_cpu_is_served(running: RunningService) -> None:
    """When several sockets were replaced, which is on which core is the order of their deaths."""
    assert sorted(running.await_state("w", "online")["cores"]) == CORES
    for cpu in CORES:
        run(*read_from(cpu))


@smp
def test_killed_workers_are_not_noticed_by_fio_and_the_others_serve(
    service: Start, tmp_path: Path
) -> None:
    running = service(wide(tmp_path, "file"), cores="0-3")
    check_each_cpu_has_its_own_worker(running)
    assert (QUEUE / "io_timeout").read_text().strip() == "10000"
    with verifying_from_all_cpus(loops=2) as fio:
        kill(running, 2)
        kill(running, running.await_state("w", "online")["core"])
        kill(running, 1, 3)
        check_verified(fio)
    check_each_cpu_is_served(running)


@smp
def test_all_workers_die_at_once(service: Start, tmp_path: Path) -> None:
    running = service(wide(tmp_path, "malloc"), cores="0-3")
    with verifying_from_all_cpus(loops=2) as fio:
        old = running.workers()
        for worker in old.values():
            worker.kill()
        running.await_true(lambda: all(running.workers().get(c, old[c]) != old[c] for c in CORES))
        running.await_state("w", "online")
        check_verified(fio)
    check_each_cpu_is_served(running)


@smp
def test_what_every_cpu_wrote_is_flushed_resized_and_removed(
    service: Start, tmp_path: Path
) -> None:
    running = service(wide(tmp_path, "file"), cores="0-3")
    data = tmp_path / "data"
    data.write_bytes(os.urandom(4 * MIB))
    for cpu in CORES:
        dd = ["dd", f"if={data}", "of=/dev/nbd0", "bs=1M", f"skip={cpu}", f"seek={cpu}", "count=1"]
        run("taskset", "-c", str(cpu), *dd, "oflag=direct", "conv=notrunc")
    run("taskset", "-c", "3", "dd", "if=/dev/null", "of=/dev/nbd0", "conv=fsync,notrunc")
    run("cmp", "-n", str(4 * MIB), str(data), str(tmp_path / "image"))
    for size in (96 * MIB, 32 * MIB):
        running.rpc("reactor_resize_disk", name="w", size=size)
        assert run("blockdev", "--getsize64", "/dev/nbd0").strip() == str(size)
        for cpu in CORES:
            run(*read_from(cpu, size // 4096 - 1))
    running.rpc("reactor_remove_disk", name="w")
    assert not attached("/dev/nbd0")


@smp
def test_the_next_controller_takes_the_device_over(service: Start, tmp_path: Path) -> None:
    config = wide(tmp_path, "malloc")
    running = service(config, cores="0-3")
    with verifying_from_all_cpus(loops=2) as fio:
        running.process.kill()
        running.process.wait()
        again = service(config, cores="0-3", runtime_dir=running.runtime_dir)
        check_verified(fio)
    check_each_cpu_is_served(again)


@smp
def test_by_ioctl_the_device_comes_back_after_a_worker_died(service: Start, tmp_path: Path) -> None:
    running = service(wide(tmp_path, "malloc", ", attach: ioctl"), cores="0-3")
    for _ in range(2):
        with verifying_from_all_cpus(loops=1) as fio:
            check_verified(fio)
        old = running.workers()[3]
        old.kill()
        running.await_true(lambda old=old: running.workers().get(3, old) != old)
        running.await_state("w", "online")
    check_each_cpu_has_its_own_worker(running)
    assert running.stop() == 0
    assert not attached("/dev/nbd0")


@pytest.mark.parametrize("backend", ["malloc", "file"])
def test_on_one_cpu_it_is_like_any_other(service: Start, tmp_path: Path, backend: str) -> None:
    running = service(wide(tmp_path, backend))
    assert running.await_state("w", "online")["cores"] == [0]
    command = fio_verify_command("/dev/nbd0", "16M", loops="2")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as fio:
        old = running.workers()[0]
        old.kill()
        running.await_true(lambda: running.workers().get(0, old) != old)
        check_verified(fio)
    running.await_state("w", "online")

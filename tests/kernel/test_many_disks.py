"""64 devices: spread evenly, each with its own data; they outlive a worker and go at the end."""

from __future__ import annotations

import mmap
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

DISKS = 64
BLOCK = 4096


def config(images: Path) -> str:
    images.mkdir()
    backends = ("malloc, size: 1MiB", "file, size: 1MiB, path: {}", "'null', size: 1MiB")
    return "disks:\n" + "".join(
        f"  disk{number}: {{backend: {backends[number % 3].format(images / str(number))},"
        f" device: /dev/nbd{number}}}\n"
        for number in range(DISKS)
    )


def keeps_data(number: int) -> bool:
    return number % 3 != 2


def block(number: int) -> bytes:
    return f"disk{number} ".encode().ljust(BLOCK, b".")


def write_block(number: int) -> None:
    with Path(f"/dev/nbd{number}").open("r+b", buffering=0) as device:
        device.write(block(number))
        os.fsync(device.fileno())


def read_block(number: int) -> bytes:
    """Read from the disk itself, not from the kernel's cache."""
    with mmap.mmap(-1, BLOCK) as page:
        fd = os.open(f"/dev/nbd{number}", os.O_RDONLY | os.O_DIRECT)
        try:
            assert os.preadv(fd, [page], 0) == BLOCK
        finally:
            os.close(fd)
        return page[:]


def check_every_disk() -> None:
    for number in range(DISKS):
        assert read_block(number) == (block(number) if keeps_data(number) else bytes(BLOCK))


def check_many_devices(service: Start, images: Path, workers: int) -> None:
    running = service(config(images), cores=f"0-{workers - 1}")
    running.await_line(f"ready: {DISKS} of {DISKS} disks on {workers} workers")
    placed = Counter(disk["core"] for disk in running.rpc("reactor_get_disks"))
    assert placed == dict.fromkeys(range(workers), DISKS // workers)
    for number in range(DISKS):
        write_block(number)
    check_every_disk()
    victim = running.workers()[0]
    victim.kill()
    running.await_true(lambda: running.workers().get(0, victim) != victim)
    for number in range(DISKS):
        running.await_state(f"disk{number}", "online")
    check_every_disk()
    assert running.stop() == 0
    assert not any(attached(f"/dev/nbd{number}") for number in range(DISKS))


def test_64_devices_on_one_worker(service: Start, tmp_path: Path) -> None:
    check_many_devices(service, tmp_path / "images", workers=1)


@pytest.mark.smp
@pytest.mark.timeout(900)
def test_64_devices_on_4_workers(service: Start, tmp_path: Path) -> None:
    check_many_devices(service, tmp_path / "images", workers=4)

"""What an operator does to devices that are in use."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import fio_verify, run
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

MIB = 1 << 20


def test_a_reload_keeps_devices_attached_at_run_time(service: Start) -> None:
    running = service("disks: {g: {backend: malloc, size: 8MiB}}")
    assert running.rpc("nbd_start_disk", bdev_name="g", nbd_device="/dev/nbd5") == "/dev/nbd5"
    running.rpc("reactor_reload")
    assert running.await_state("g", "online")["device"] == "/dev/nbd5"
    fio_verify("/dev/nbd5", "4M")


def test_auto_leaves_the_devices_that_other_disks_name(service: Start) -> None:
    running = service(
        "disks:\n"
        "  any1: {backend: malloc, size: 8MiB, device: auto}\n"
        "  any2: {backend: malloc, size: 8MiB, device: auto}\n"
        "  ram0: {backend: malloc, size: 8MiB, device: /dev/nbd0}\n"
        "  ram1: {backend: malloc, size: 8MiB, device: /dev/nbd1}\n"
    )
    disks = running.rpc("reactor_get_disks")
    assert [disk["state"] for disk in disks] == ["online"] * 4
    assert [disk["device"] for disk in disks[2:]] == ["/dev/nbd0", "/dev/nbd1"]


def test_auto_is_no_device_to_stop(service: Start) -> None:
    running = service("disks: {any: {backend: malloc, size: 8MiB, device: auto}}")
    assert running.rpc_raw("nbd_stop_disk", nbd_device="auto")["error"]["code"] == -19
    running.await_state("any", "online")


@pytest.mark.parametrize("harm", ["kill", "suspend"])
def test_a_stop_writes_the_cache_back_past_a_lost_worker(
    service: Start, tmp_path: Path, harm: str
) -> None:
    image = tmp_path / "image"
    running = service(
        f"disks: {{f: {{backend: file, path: {image}, size: 8MiB, device: /dev/nbd0}}}}"
    )
    data = os.urandom(4 * MIB)
    device = os.open("/dev/nbd0", os.O_RDWR)  # held open: closing it would write it back
    try:
        os.pwrite(device, data, 0)
        getattr(running.workers()[0], harm)()
        assert running.stop() == 0
        assert image.read_bytes()[: 4 * MIB] == data
    finally:
        os.close(device)


def test_a_device_passes_from_a_removed_disk_to_a_new_one(service: Start) -> None:
    running = service("disks: {old: {backend: malloc, size: 8MiB, device: /dev/nbd0}}")
    run("dd", "if=/dev/urandom", "of=/dev/nbd0", "bs=1M", "count=4")
    running.config_path.write_text("disks: {new: {backend: malloc, size: 8MiB, device: /dev/nbd0}}")
    running.rpc("reactor_reload")
    assert running.await_state("new", "online")["device"] == "/dev/nbd0"
    fio_verify("/dev/nbd0", "4M")


@pytest.mark.parametrize(("size", "found"), [(4, 8), (16, 16)])
def test_a_kept_device_grows_with_its_disk_and_is_never_cut(
    service: Start, size: int, found: int
) -> None:
    config = "disks: {ram: {backend: malloc, size: SIZEMiB, device: /dev/nbd0}}"
    running = service(config.replace("SIZE", "8"), "--on-exit", "keep")
    running.process.terminate()
    assert running.process.wait(60) == 0
    again = service(config.replace("SIZE", str(size)), runtime_dir=running.runtime_dir)
    expected = str(found * MIB)
    again.await_true(
        lambda: (
            run("blockdev", "--getsize64", "/dev/nbd0").strip() == expected
            and again.rpc("reactor_get_disks")[0]["state"] == "online"
        )
    )
    fio_verify("/dev/nbd0", "2M")


def test_workers_are_spared_under_memory_pressure(service: Start) -> None:
    worker = service().workers()[0]
    assert Path(f"/proc/{worker.pid}/oom_score_adj").read_text().strip() == "-900"
    io_flusher = 0x00080000 | 0x00100000  # PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE
    for thread in worker.threads():
        stat = Path(f"/proc/{worker.pid}/task/{thread.id}/stat").read_text()
        flags = int(stat.rpartition(")")[2].split()[6])
        assert flags & io_flusher == io_flusher

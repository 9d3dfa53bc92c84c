"""Hot remove with I/O in flight: it ends or fails clearly, the device is free, others go on."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached, ctl, endless_writes, fio_verify
from tests.mounting import mounted_new
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]


def writes(running: RunningService, name: str) -> int:
    count: int = running.rpc("reactor_get_disks", name=name)[0]["statistics"].get("writes", 0)
    return count


@pytest.fixture(params=["netlink", "ioctl"])
def running(request: pytest.FixtureRequest, service: Start, tmp_path: Path) -> RunningService:
    image = tmp_path / "victim.img"
    return service(f"""
disks:
  ram: {{backend: malloc, size: 64MiB, device: /dev/nbd0, attach: {request.param}}}
  file: {{backend: file, path: {image}, size: 64MiB, device: /dev/nbd1, attach: {request.param}}}
  other: {{backend: malloc, size: 64MiB, device: /dev/nbd2, attach: {request.param}}}
""")


def check_fio_ends_and_the_device_is_free(
    running: RunningService, fio: subprocess.Popen[bytes], device: str
) -> None:
    assert fio.wait(60) != 0, "fio must be told that its device is gone"
    running.await_true(lambda: not attached(device))
    fio_verify("/dev/nbd2", "4M")


def test_remove_by_command(running: RunningService) -> None:
    with endless_writes("/dev/nbd0") as fio:
        running.await_true(lambda: writes(running, "ram") > 0)
        ctl(running.runtime_dir, "remove", "ram")
        check_fio_ends_and_the_device_is_free(running, fio, "/dev/nbd0")
    assert running.rpc_raw("reactor_get_disks", name="ram")["error"]["code"] == -19


def test_delete_of_an_exported_malloc_disk(running: RunningService) -> None:
    with endless_writes("/dev/nbd0") as fio:
        running.await_true(lambda: writes(running, "ram") > 0)
        assert running.rpc("bdev_malloc_delete", name="ram") is True
        assert not attached("/dev/nbd0")
        check_fio_ends_and_the_device_is_free(running, fio, "/dev/nbd0")


@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_a_lost_backing_file(running: RunningService, tmp_path: Path, harm: str) -> None:
    image = tmp_path / "victim.img"
    with endless_writes("/dev/nbd1") as fio:
        running.await_true(lambda: writes(running, "file") > 0)
        if harm == "unlink":
            image.unlink()
        else:
            with image.open("r+b") as backing:
                backing.truncate(4096)
        check_fio_ends_and_the_device_is_free(running, fio, "/dev/nbd1")
    assert running.await_state("file", "removed")["reason"]


def test_who_keeps_a_removed_device_is_named(service: Start, tmp_path: Path) -> None:
    image, away = tmp_path / "image", tmp_path / "away"
    running = service(f"""
disks:
  file: {{backend: file, path: {image}, size: 16MiB, device: /dev/nbd0, attach: netlink}}
""")
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount:
        image.rename(away)
        running.await_state("file", "removed")
        away.rename(image)
        refusal = running.rpc_raw("reactor_start_disk", name="file")["error"]["message"]
        assert f"used by the mount {mount}" in refusal
        assert f"used by the mount {mount}" in running.await_state("file", "failed")["reason"]
    ctl(running.runtime_dir, "start", "file")
    running.await_state("file", "online")

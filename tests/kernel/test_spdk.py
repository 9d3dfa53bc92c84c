"""SPDK's client starts and stops real devices, as SPDK's own nbd tests do."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached, run
from tests.running import RunningService
from tests.spdk import spdk_rpc

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]


def test_each_disk_gets_the_next_free_device_and_all_are_freed(service: Start) -> None:
    running = service()
    for name in ("a", "b", "c"):
        spdk_rpc(running, "bdev_malloc_create", "-b", name, "16", "512")
    devices = [spdk_rpc(running, "nbd_start_disk", name).strip() for name in ("a", "b", "c")]
    assert len(set(devices)) == 3
    assert all(attached(device) for device in devices)
    listed = json.loads(spdk_rpc(running, "nbd_get_disks"))
    assert [(disk["bdev_name"], disk["nbd_device"]) for disk in listed] == list(
        zip(("a", "b", "c"), devices, strict=True)
    )
    for device in devices:
        spdk_rpc(running, "nbd_stop_disk", device)
        assert not attached(device), "stopped means free"
    assert json.loads(spdk_rpc(running, "nbd_get_disks")) == []
    assert spdk_rpc(running, "nbd_start_disk", "a", devices[0]).strip() == devices[0]


def test_data_written_to_the_device_is_read_back(service: Start, tmp_path: Path) -> None:
    running = service()
    spdk_rpc(running, "bdev_malloc_create", "-b", "ram", "16", "4096")
    spdk_rpc(running, "nbd_start_disk", "ram", "/dev/nbd0")
    data, copy = tmp_path / "data", tmp_path / "copy"
    data.write_bytes(os.urandom(1 << 20))
    run("dd", f"if={data}", "of=/dev/nbd0", "bs=4096", "count=256", "oflag=direct")
    run("dd", "if=/dev/nbd0", f"of={copy}", "bs=4096", "count=256", "iflag=direct")
    assert filecmp.cmp(data, copy, shallow=False)
    spdk_rpc(running, "nbd_stop_disk", "/dev/nbd0")
    spdk_rpc(running, "nbd_start_disk", "ram", "/dev/nbd1")
    run("cmp", "-n", str(1 << 20), str(data), "/dev/nbd1")


def test_busy_devices_and_disks_are_refused(service: Start) -> None:
    running = service()
    for name in ("a", "b"):
        spdk_rpc(running, "bdev_malloc_create", "-b", name, "16", "512")
    spdk_rpc(running, "nbd_start_disk", "a", "/dev/nbd0")
    for disk, device, code in (("a", "/dev/nbd0", -16), ("b", "/dev/nbd0", -16)):
        told = spdk_rpc(running, "nbd_start_disk", disk, device, status=1)
        assert f'"code": {code}' in told
    assert '"code": -1,' in spdk_rpc(running, "nbd_start_disk", "a", "/dev/nbd1", status=1)
    assert {disk["state"] for disk in running.rpc("reactor_get_disks")} == {"online"}
    spdk_rpc(running, "nbd_start_disk", "b", "/dev/nbd1")


def test_deleting_an_exported_disk_frees_its_device(service: Start) -> None:
    running = service()
    spdk_rpc(running, "bdev_malloc_create", "-b", "ram", "16", "512")
    spdk_rpc(running, "nbd_start_disk", "ram", "/dev/nbd0")
    assert spdk_rpc(running, "bdev_malloc_delete", "ram") == ""
    assert not attached("/dev/nbd0")
    assert json.loads(spdk_rpc(running, "nbd_get_disks")) == []

"""A device by ioctl whose worker died under its users: it comes back when they let it go."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import run
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

CONFIG = "disks: {m: {backend: malloc, size: 16MiB, device: /dev/nbd0, attach: ioctl}}"
WAITS = "waits for those who have /dev/nbd0 open to let it go"


def reason(running: RunningService) -> str:
    return str(running.rpc("reactor_get_disks", name="m")[0]["reason"])


def kill_the_worker(running: RunningService) -> None:
    (worker,) = running.workers().values()
    worker.kill()
    running.await_true(lambda: reason(running) == WAITS)


def test_the_device_comes_back_when_its_users_let_it_go(service: Start, tmp_path: Path) -> None:
    running = service(CONFIG)
    user = os.open("/dev/nbd0", os.O_RDONLY)
    try:
        kill_the_worker(running)
    finally:
        os.close(user)
    running.await_state("m", "online")
    run("mkfs.ext4", "-q", "/dev/nbd0")
    folder = tmp_path / "mount"
    folder.mkdir()
    run("mount", "/dev/nbd0", str(folder))
    kill_the_worker(running)
    run("umount", str(folder))
    running.await_state("m", "online")
    run("e2fsck", "-fp", "/dev/nbd0", check=False)  # 1: it replayed the journal
    run("e2fsck", "-fn", "/dev/nbd0")

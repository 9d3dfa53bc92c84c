"""While the state cannot be saved no device is attached of which the next start knows nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached, ctl, run
from tests.mounting import mounted_new
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

DISK = "{backend: malloc, size: 16MiB, device: /dev/nbd%d}"
CONFIG = f"""
disks:
  stopped: {DISK % 0}
  plain: {{backend: malloc, size: 16MiB}}
"""
REFUSAL = "nothing was done, as it could not be saved"


def test_the_next_start_knows_every_device(service: Start, tmp_path: Path) -> None:
    running = service(CONFIG)
    ctl(running.runtime_dir, "stop", "stopped")
    obstacle = running.runtime_dir / "state.json.new"
    obstacle.mkdir()
    new = running.rpc_raw("reactor_start_disk", name="new", keys={"backend": "null", "size": 4096})
    again = running.rpc_raw("reactor_start_disk", name="stopped")
    device = running.rpc_raw("nbd_start_disk", bdev_name="plain", nbd_device="/dev/nbd1")
    assert REFUSAL in new["error"]["message"]
    assert REFUSAL in again["error"]["message"]
    assert "error" in device
    states = {disk["name"]: disk["state"] for disk in running.rpc("reactor_get_disks")}
    assert states == {"stopped": "stopped", "plain": "online"}
    assert not attached("/dev/nbd0")
    assert not attached("/dev/nbd1")

    running.config_path.write_text(f"{CONFIG}  added: {DISK % 2}\n")
    assert "cannot be saved" in running.rpc_raw("reactor_reload")["error"]["message"]
    running.await_state("added", "online")
    with mounted_new("/dev/nbd2", tmp_path / "mount") as mount:
        running.process.kill()
        running.process.wait()
        obstacle.rmdir()
        later = service(running.config_path.read_text(), runtime_dir=running.runtime_dir)
        later.await_state("added", "online")
        (mount / "file").write_bytes(os.urandom(1 << 20))
        os.sync()
    run("fsck.ext4", "-fn", "/dev/nbd2")
    assert "detached" not in later.log

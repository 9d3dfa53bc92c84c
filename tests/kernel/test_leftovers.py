"""Devices that a dead controller left and that no disk is to be on any more."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached
from tests.running import RunningService
from tests.service.memory_disks import nbdsh

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(240)]
Start = Callable[..., RunningService]

GIVEN_UP = "/dev/nbd0 is disconnected, but stays in use"
KEYS = {"backend": "malloc", "size": "8MiB", "device": "auto"}


def crash(running: RunningService) -> None:
    running.process.kill()
    running.process.wait()


def tags() -> list[str]:
    """Return whose devices the kernel holds."""
    held = (Path("/sys/block") / f"nbd{number}" / "backend" for number in range(4))
    return [path.read_text().strip() for path in held if path.exists()]


def test_what_was_written_is_written_back_by_the_next_controller(
    service: Start, tmp_path: Path
) -> None:
    listen = f"unix:{tmp_path}/a.sock"
    running = service()
    running.rpc(
        "reactor_start_disk", name="a", keys={**KEYS, "device": "/dev/nbd0", "listen": listen}
    )
    (worker,) = running.workers().values()
    with (
        open("/dev/nbd0", "r+b", buffering=0) as device,  # noqa: PTH123
        socket.socket(socket.AF_UNIX) as detaching,
    ):
        device.write(b"w" * 65536)  # into the page cache, and no farther
        worker.suspend()
        request = {"jsonrpc": "2.0", "id": 1, "method": "nbd_stop_disk"}
        detaching.connect(str(running.rpc_socket))
        detaching.sendall(json.dumps({**request, "params": {"nbd_device": "/dev/nbd0"}}).encode())
        state = running.runtime_dir / "state.json"
        running.await_true(lambda: b'"/dev/nbd0"' not in state.read_bytes())
        running.process.kill()
        worker.resume()  # a controller that has begun to write back ends no sooner
        running.process.wait()
        assert attached("/dev/nbd0")
        again = service(runtime_dir=running.runtime_dir)
        again.await_line(GIVEN_UP)
    again.await_true(lambda: not attached("/dev/nbd0"))
    again.await_state("a", "online")
    nbdsh(tmp_path, "a", "assert h.pread(65536, 0) == b'w' * 65536")


def test_a_new_disk_of_the_name_waits_until_the_old_device_is_gone(service: Start) -> None:
    running = service()
    running.rpc("reactor_start_disk", name="a", keys={**KEYS, "device": "/dev/nbd0"})
    (worker,) = running.workers().values()
    crash(running)
    worker.kill()
    held = os.open("/dev/nbd0", os.O_RDONLY)
    try:
        (running.runtime_dir / "state.json").unlink()
        again = service(runtime_dir=running.runtime_dir)
        again.await_line("/dev/nbd0 is detached: it is no device of disk a any more")
        answers: list[dict[str, object]] = []
        creating = threading.Thread(
            target=lambda: answers.append(again.rpc_raw("reactor_start_disk", name="a", keys=KEYS))
        )
        creating.start()
        again.await_true(lambda: again.rpc("reactor_get_disks") != [])
        creating.join(2)
        # Read in this order: it is said first.
        assert (creating.is_alive() and len(tags()) == 1) or GIVEN_UP in again.log
    finally:
        os.close(held)
    creating.join()
    assert "error" not in answers[0], again.log
    again.await_true(lambda: len(tags()) == 1)
    path = again.rpc("reactor_get_disks", name="a")[0]["device"]
    with open(path, "rb", buffering=0) as device:  # noqa: PTH123
        assert len(device.read(4096)) == 4096

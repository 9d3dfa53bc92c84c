"""Many disks on one worker while nothing is asked of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.client import Client
from tests.running import RunningService

DISKS = 32
TURNS_A_SECOND = 10  # the heartbeat and all watched files have one, the others are for luck


def test_idle_disks_take_no_turns(service: Callable[..., RunningService], tmp_path: Path) -> None:
    running = service(
        "disks:\n"
        + "".join(
            f"  disk{n}: {{backend: file, path: {tmp_path}/{n}.img, size: 1MiB,"
            f" listen: 'unix:{tmp_path}/{n}.sock'}}\n"
            for n in range(DISKS)
        )
    )

    def turns() -> int:
        count: int = running.rpc("reactor_get_workers")[0]["statistics"].get("turns", 0)
        return count

    def after(before: int) -> int:
        running.await_true(lambda: turns() != before)  # the next heartbeat
        return turns()

    clients = [Client(tmp_path / f"{n}.sock", f"disk{n}") for n in range(DISKS)]
    try:
        settled = after(after(turns()))
        assert after(settled) - settled <= TURNS_A_SECOND
        clients[7].read(0, 512)
        after(after(turns()))
        for number, disk in enumerate(running.rpc("reactor_get_disks")):
            assert disk["statistics"]["reads"] == (number == 7)
            assert disk["statistics"]["connections"] == 1
    finally:
        for client in clients:
            client.close()

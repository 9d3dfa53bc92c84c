"""The kernel's device through nbd-client and a socket, instead of by the service."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from tests.commands import attached, run
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

MIB = 1 << 20


class NbdClient:
    """nbd-client, started again whenever it ends.

    It does with -persist, too: it takes the 0 that NBD_DO_IT returns when a server has gone, from
    Linux 4.12 or so on, for the wish to end.
    """

    def __init__(self, path: Path, device: str) -> None:
        options = ("-N", "ram", "-persist", "-nonetlink", "-nofork")
        self._command = ["nbd-client", "-unix", str(path), device, *options]
        self._device = device
        self._process = self._start()

    def is_attached(self) -> bool:
        if self._process.poll() is not None:
            self._process = self._start()
        return Path("/sys/block", Path(self._device).name, "size").read_text() != "0\n"

    def end(self) -> None:
        run("nbd-client", "-d", self._device)
        self._process.wait(60)

    def _start(self) -> subprocess.Popen[bytes]:
        null = subprocess.DEVNULL
        return subprocess.Popen(self._command, stdin=null, stdout=null, stderr=null)


def has_another_worker(running: RunningService, old: psutil.Process) -> bool:
    return running.workers().get(0, old) != old


def test_its_device_comes_back(service: Start, tmp_path: Path) -> None:
    path, data = tmp_path / "ram.sock", tmp_path / "data"
    running = service(f"disks: {{ram: {{backend: malloc, size: 16MiB, listen: 'unix:{path}'}}}}")
    client = NbdClient(path, "/dev/nbd0")
    try:
        for _ in range(3):
            running.await_true(client.is_attached)
            run("dd", "if=/dev/urandom", f"of={data}", "bs=1M", "count=4")
            run("dd", f"if={data}", "of=/dev/nbd0", "bs=1M", "oflag=direct")
            old = running.workers()[0]
            old.kill()
            running.await_true(partial(has_another_worker, running, old))
            running.await_state("ram", "online")
            running.await_true(client.is_attached)
            run("cmp", "-n", str(4 * MIB), str(data), "/dev/nbd0")
    finally:
        client.end()
    assert not attached("/dev/nbd0")

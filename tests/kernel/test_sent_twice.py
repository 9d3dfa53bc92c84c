"""A write that the kernel sends a second time, and whose first copy is still on its way."""

from __future__ import annotations

import mmap
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from backends.api import PAYLOAD, Buffer, Channel, Owner, Request
from reactor.attach.device import attach
from reactor.loop import Reactor
from tests.commands import run
from tests.kernel.conftest import FLAGS_ALL, MIB, SIZE, Memory, MemoryChannel, Server
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, pytest.mark.smp, pytest.mark.timeout(900)]
Start = Callable[..., RunningService]

SLOW_SECONDS = 18.0  # longer than the 10 after which the kernel sends a request again
PAGE = 4096
PLACE = MIB
FIRST, SECOND = b"the first write ", b"the second write"


class SlowOnce(Memory):
    """A medium that takes its time for the first write of FIRST, and for no other."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[bytes] = []  # what was written of the two, in this order
        self.is_slow = True

    def channel(self, reactor: Reactor) -> Channel:
        return SlowOnceChannel(self, reactor)


class SlowOnceChannel(MemoryChannel):
    disk: SlowOnce

    def __init__(self, disk: SlowOnce, reactor: Reactor) -> None:
        super().__init__(disk)
        self._reactor = reactor

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        payload = request[PAYLOAD]
        begin = b"" if payload is None else bytes(payload[: len(FIRST)])
        if payload is None or begin not in (FIRST, SECOND):
            return super().submit(request, owner)
        if begin == SECOND or not self.disk.is_slow:
            self.disk.done.append(begin)
            return super().submit(request, owner)
        self.disk.is_slow = False
        late = (*request[:PAYLOAD], memoryview(bytes(payload)))

        def finish() -> None:
            self.disk.done.append(begin)
            super(SlowOnceChannel, self).submit(late, owner)
            owner.complete(late, 0, b"")

        self._reactor.call_later(SLOW_SECONDS, finish)
        return None


@pytest.fixture
def medium(tmp_path: Path) -> Iterator[tuple[SlowOnce, Path]]:
    """A slow medium and an image on it; ask for it before `service`, which must end before."""
    disk = SlowOnce()
    server = Server(disk)
    device = attach(
        *("/dev/nbd5", "netlink"),
        kernel_ends=[server.connect()],
        tag="nbd-reactor:test:slow",
        size=SIZE,
        block_size=512,
        flags=FLAGS_ALL,
        timeout=None,
        dead_timeout=60,
    )
    folder = tmp_path / "mounted"
    folder.mkdir()
    try:
        run("mkfs.ext4", "-q", "/dev/nbd5")
        run("mount", "/dev/nbd5", str(folder))
        run("dd", "if=/dev/zero", f"of={folder}/image", "bs=1M", "count=8", "conv=fsync")
        yield disk, folder / "image"
    finally:
        with suppress(AssertionError, subprocess.CalledProcessError):
            run("umount", str(folder))
        device.detach()
        server.close()


@contextmanager
def opened() -> Iterator[tuple[int, mmap.mmap]]:
    fd = os.open("/dev/nbd0", os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE) as page:
            yield fd, page
    finally:
        os.close(fd)


def write(data: bytes, cpu: int) -> None:
    os.sched_setaffinity(0, {cpu})
    with opened() as (fd, page):
        page[:] = data * (PAGE // len(data))
        os.pwritev(fd, [page], PLACE)
        os.fsync(fd)


def read() -> bytes:
    with opened() as (fd, page):
        os.preadv(fd, [page], PLACE)
        return page[: len(FIRST)]


@pytest.fixture(autouse=True)
def cpus() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, before)


@pytest.mark.parametrize("killed", [False, True])
def test_what_was_written_last_stays(
    medium: tuple[SlowOnce, Path], service: Start, killed: bool
) -> None:
    """Killed: the first copy is then in the ring of a worker that is no more."""
    disk, image = medium
    running = service(
        f"disks:\n  w: {{backend: file, path: {image}, direct: true, device: /dev/nbd0,"
        " connections: 2}\n",
        cores="0-1",
    )
    running.await_state("w", "online")
    killer = None
    if killed:
        pid = str(running.workers()[0].pid)
        killer = subprocess.Popen(["sh", "-c", f"sleep 3; kill -9 {pid}"])
    try:
        write(FIRST, cpu=0)
        write(SECOND, cpu=1)
        assert read() == SECOND
    finally:
        if killer is not None:
            killer.wait()
    began = time.monotonic()
    while disk.done[:1] != [FIRST] or (killed and len(disk.done) < 3):
        assert time.monotonic() - began < 3 * SLOW_SECONDS
        time.sleep(0.1)
    time.sleep(1)
    assert disk.done == [FIRST, FIRST, SECOND]
    assert read() == SECOND
    assert running.stop() == 0

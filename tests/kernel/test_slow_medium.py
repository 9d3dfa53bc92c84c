"""The medium below a file disk takes half a minute for an answer: nothing else is slow or dies."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from reactor.control.shares import OPEN_SECONDS
from reactor.protocol.wire import NBD_CMD_FLAG_FUA, NBD_CMD_WRITE
from tests.client import Client
from tests.commands import fio_verify, fio_verify_command, in_flight
from tests.kernel.media import MIB, Medium, few_dirty_pages, medium, needs_drivers, state
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, needs_drivers]
Start = Callable[..., RunningService]

HANG_SECONDS = 35.0
SLOW_SECONDS = 25.0  # with the client's grace longer than an answer may take
BLOCKED_SECONDS = 16.0  # longer than the controller waits for a worker


@pytest.fixture
def media(tmp_path: Path) -> Iterator[list[Medium]]:
    """Make two slow media and a good one; ask for it before `service`, which must end before."""
    with ExitStack() as made:
        names = ("cached", "direct", "good")
        yield [made.enter_context(medium(name, tmp_path)) for name in names]


def direct_and_ram(direct: Medium, served: str = "device: /dev/nbd0") -> str:
    """Return the config of a disk on a medium, `served` so, and one of memory with a device."""
    return f"""
disks:
  direct: {{backend: file, path: {direct.path}, direct: true, {served}}}
  ram: {{backend: malloc, size: 16MiB, device: /dev/nbd1}}
"""


@contextmanager
def working(command: list[str]) -> Iterator[None]:
    """Run a program beside; it must succeed."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=subprocess.STDOUT
    )
    try:
        yield
        output, _ = process.communicate(timeout=100)
        assert process.returncode == 0, output.decode()
    finally:
        process.kill()
        process.communicate()


def check_nothing_was_ended(running: RunningService, worker: psutil.Process) -> None:
    assert running.workers() == {0: worker}
    for word in ("is killed", "aborted", "was ended", "lost a connection", "Traceback"):
        assert word not in running.log
    assert running.stop() == 0


def test_hanging_media_are_reported_and_the_others_served(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    cached, direct, good = media
    running = service(f"""
disks:
  cached: {{backend: file, path: {cached.path}, device: /dev/nbd0, listen: 'unix:{tmp_path}/c'}}
  direct: {{backend: file, path: {direct.path}, direct: true, device: /dev/nbd1}}
  good: {{backend: file, path: {good.path}, device: /dev/nbd2}}
  ram: {{backend: malloc, size: 16MiB, device: /dev/nbd3}}
""")
    worker = running.workers()[0]
    with ExitStack() as beside:
        for device in ("/dev/nbd0", "/dev/nbd1"):
            command = fio_verify_command(device, "4M", fsync="8", loops="10")
            beside.enter_context(working(command))
        clients = [beside.enter_context(Client(tmp_path / "c", "cached")) for _ in range(4)]
        time.sleep(1)
        began = time.monotonic()
        for slow in (cached, direct):
            slow.hang()
        try:
            for number, client in enumerate(clients):
                client.sock.settimeout(100)
                for place in range(8):  # more than there are kernel threads for them at first
                    offset = (16 + 8 * number + place) * MIB
                    flags, payload = NBD_CMD_FLAG_FUA, b"x" * 4096
                    client.submit(NBD_CMD_WRITE, offset, 4096, flags=flags, payload=payload)
            # Each must go off the loop, into kernel threads of which the media hold many.
            fio_verify("/dev/nbd2", "2M", fsync="4")
            fio_verify("/dev/nbd3", "2M")
            for name in ("cached", "direct"):
                running.await_line(f"disk {name}: its storage has not answered for ")
            time.sleep(max(0.0, began + HANG_SECONDS - time.monotonic()))
            fio_verify("/dev/nbd2", "2M", fsync="4", rw="write")
        finally:
            for slow in (cached, direct):
                slow.go_on()
        for client in clients:
            assert [error for _, error, _ in client.finish(8)] == [0] * 8
    for name in ("cached", "direct"):
        running.await_line(f"disk {name}: its storage answers again")
        assert running.log.count(f"disk {name}: its storage") <= 4
        assert running.await_state(name, "online")["reason"] == ""
    assert "disk good: its storage" not in running.log
    check_nothing_was_ended(running, worker)


def test_a_worker_that_waits_for_a_medium_is_reported_and_not_killed(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    cached, _, _ = media
    running = service(f"""
disks:
  cached: {{backend: file, path: {cached.path}, device: /dev/nbd0, listen: 'unix:{tmp_path}/c'}}
""")
    worker = running.workers()[0]
    try:
        with few_dirty_pages(4 * MIB), Client(tmp_path / "c", "cached") as client:
            client.sock.settimeout(100)
            cached.hang()
            # Nothing waits yet that would tell: the page cache takes it, until it is full.
            client.submit(NBD_CMD_WRITE, 0, 16 * MIB, payload=os.urandom(16 * MIB))
            running.await_true(lambda: state(worker.pid) == "D")
            time.sleep(BLOCKED_SECONDS)
            cached.go_on()
            assert [error for _, error, _ in client.finish(1)] == [0]
            client.flush()
    finally:
        cached.go_on()
    running.await_line("disk cached: its storage kept a whole worker waiting for ")
    assert running.log.count("waits for a medium for") == 1
    check_nothing_was_ended(running, worker)


def test_a_disk_on_a_slow_medium_is_stopped_beside_the_others(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    """What the medium has of it ends after the client was let go; that kills no worker."""
    _, direct, _ = media
    running = service(direct_and_ram(direct, f"listen: 'unix:{tmp_path}/d'"))
    worker = running.workers()[0]
    name = {"name": "direct"}
    stopping = threading.Thread(target=running.rpc, args=["reactor_stop_disk"], kwargs=name)
    with Client(tmp_path / "d", "direct") as client:
        try:
            direct.hang()
            client.submit(NBD_CMD_WRITE, 0, 4096, payload=bytes(4096))
            stopping.start()
            time.sleep(SLOW_SECONDS)
            assert stopping.is_alive()
            fio_verify("/dev/nbd1", "2M")
        finally:
            direct.go_on()
    stopping.join()
    running.await_state("direct", "stopped")
    check_nothing_was_ended(running, worker)


def test_a_disk_on_a_hanging_medium_starts_when_it_answers(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    _, direct, _ = media
    direct.hang()
    try:
        running = service(direct_and_ram(direct), await_ready=False)
        running.await_line("disk direct waits for its storage, which does not answer")
        running.await_state("ram", "online")
        fio_verify("/dev/nbd1", "2M")
    finally:
        direct.go_on()
    running.await_line("ready: 2 of 2 disks")
    fio_verify("/dev/nbd0", "2M")
    assert running.stop() == 0


def test_a_device_that_is_slow_to_close_is_written_to_beside_the_worker(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    cached, _, _ = media
    running = service(f"""
disks:
  cached: {{backend: file, path: {cached.path}, listen: 'unix:{tmp_path}/c'}}
  ram: {{backend: malloc, size: 16MiB, device: /dev/nbd1}}
""")
    worker = running.workers()[0]
    data = os.urandom(2 * MIB)
    with Client(tmp_path / "c", "cached") as client:
        cached.hang()
        try:
            client.write(0, data)
            running.rpc("reactor_stop_disk", name="cached")
            running.await_line(f"{cached.path} is closed, but still being written to")
            fio_verify("/dev/nbd1", "2M")
        finally:
            cached.go_on()
    running.rpc("reactor_start_disk", name="cached")
    with Client(tmp_path / "c", "cached") as client:
        assert client.read(0, 2 * MIB) == data
    check_nothing_was_ended(running, worker)


def test_a_device_waits_for_what_a_dead_worker_had_begun(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    """The kernel keeps the file of a killed worker open until its last write has ended."""
    _, direct, _ = media
    running = service(f"""
disks:
  direct: {{backend: file, path: {direct.path}, direct: true, device: /dev/nbd0}}
""")
    direct.become(direct.slow_to_write(int(BLOCKED_SECONDS * 1000)))
    write = ["dd", "if=/dev/zero", "of=/dev/nbd0", "bs=4k", "count=1", "oflag=direct"]
    with working(write):
        running.await_true(lambda: in_flight("/dev/nbd0") == 1)
        time.sleep(1)
        running.workers()[0].kill()
        running.await_line("controller: disk direct waits: ")
        direct.become(direct.healthy())
    assert running.await_state("direct", "online")["reason"] == ""
    fio_verify("/dev/nbd0", "2M")
    assert "failed" not in running.log
    assert running.stop() == 0


def test_a_disk_on_a_slow_medium_is_opened_again_beside_the_others(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    """Each read takes longer than a worker may be silent without a word in the log."""
    _, direct, _ = media
    running = service(direct_and_ram(direct))
    direct.become(direct.slow(int(BLOCKED_SECONDS * 1000)))
    running.workers()[0].kill()
    running.await_line("disk direct waits for its storage, which does not answer")
    fio_verify("/dev/nbd1", "2M")
    running.await_state("direct", "online")
    assert "waits for a medium" not in running.log
    direct.become(direct.healthy())
    fio_verify("/dev/nbd0", "2M")
    assert running.stop() == 0


@pytest.mark.timeout(300)
def test_a_device_waits_for_a_medium_that_hangs_when_its_worker_starts_again(
    media: list[Medium], service: Start, tmp_path: Path
) -> None:
    """Longer than an answer of a worker may take otherwise, and nothing else has to wait for it."""
    _, direct, _ = media
    running = service(direct_and_ram(direct))
    write = ["dd", "if=/dev/zero", "of=/dev/nbd0", "bs=4k", "count=1", "oflag=direct"]
    direct.hang()
    try:
        with working(write):
            running.await_true(lambda: in_flight("/dev/nbd0") == 1)
            running.workers()[0].kill()
            running.await_line("disk direct waits for its storage, which does not answer")
            running.await_state("ram", "online")
            time.sleep(OPEN_SECONDS + 5)
            assert "failed" not in running.log
            direct.go_on()
    finally:
        direct.go_on()
    running.await_state("direct", "online")
    fio_verify("/dev/nbd0", "2M")
    assert running.stop() == 0

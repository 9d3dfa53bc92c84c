"""A service short of descriptors or memory says so, serves what it can, and recovers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import Client
from tests.running import RunningService
from tests.shortages import few_descriptors, little_memory

Start = Callable[..., RunningService]
MIB = 1 << 20
SHORT_SECONDS = 3.0
TURNS_PER_SECOND = 300  # of a loop that does not spin; one that does makes 100,000

DISKS = """
disks:
  ram: {{backend: malloc, size: 64MiB, listen: 'unix:{0}/ram'}}
  file: {{backend: file, path: {0}/image, size: 64MiB, listen: 'unix:{0}/file'}}
  direct: {{backend: file, path: {0}/direct.image, size: 64MiB, direct: true,
           listen: 'unix:{0}/direct'}}
"""
NAMES = ("ram", "file", "direct")


def start_scratch(running: RunningService, folder: Path) -> int:
    """Start one more disk; returns the error code, 0 for none."""
    path = str(folder / "scratch.image")
    keys = {"backend": "file", "path": path, "size": MIB, "listen": f"unix:{folder}/scratch"}
    answer = running.rpc_raw("reactor_start_disk", name="scratch", keys=keys)
    return int(answer["error"]["code"]) if "error" in answer else 0


def check_all_serve(running: RunningService, folder: Path) -> None:
    for name in NAMES:
        running.await_state(name, "online")
        data = os.urandom(4 * MIB)
        with Client(folder / name, name) as client:
            client.write(0, data, fua=True)
            assert client.read(0, 4 * MIB) == data


def turns(running: RunningService) -> int:
    count: int = running.rpc("reactor_get_workers")[0]["statistics"].get("turns", 0)
    return count


def test_a_worker_without_descriptors(service: Start, tmp_path: Path) -> None:
    running = service(DISKS.format(tmp_path))
    worker = running.workers()[0]
    with (
        Client(tmp_path / "ram", "ram") as before,
        socket.socket(socket.AF_UNIX) as late,
        few_descriptors(worker.pid, 0),
    ):
        late.connect(str(tmp_path / "ram"))
        running.await_line(f"cannot accept a client on unix:{tmp_path}/ram: Too many open files")
        began, turned = time.monotonic(), turns(running)
        assert start_scratch(running, tmp_path) == -errno.EMFILE
        before.write(0, b"x" * 4096)
        assert before.read(0, 4096) == b"x" * 4096
        # Nothing may spin on the client that waits.
        most_turns = (time.monotonic() - began + SHORT_SECONDS) * TURNS_PER_SECOND
        assert turns(running) - turned < most_turns
        _, most_descriptors = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (most_descriptors,) * 2)
        late.settimeout(30)
        assert late.recv(8) == b"NBDMAGIC", "the client that waited is served"
    for more in (1, 3, 5, 7):  # each is short of something else
        with few_descriptors(worker.pid, more):
            assert start_scratch(running, tmp_path) in (-errno.EMFILE, 0)
            running.rpc_raw("reactor_remove_disk", name="scratch")
    assert start_scratch(running, tmp_path) == 0
    check_all_serve(running, tmp_path)
    assert running.workers() == {0: worker}
    assert "Traceback" not in running.log


def test_a_worker_that_begins_without_descriptors(service: Start, tmp_path: Path) -> None:
    running = service(DISKS.format(tmp_path))
    dead = running.workers()[0]
    dead.kill()
    worker = running.unborn_worker(dead.pid)
    running.await_true(lambda: "nbd-reactor: worker core 0" in " ".join(worker.cmdline()))
    running.process.send_signal(signal.SIGSTOP)  # until there are none
    time.sleep(1)
    with few_descriptors(worker.pid, 0):
        running.process.send_signal(signal.SIGCONT)
        running.await_line("disk ram waits: ")
        time.sleep(SHORT_SECONDS)
    check_all_serve(running, tmp_path)
    assert running.workers() == {0: worker}
    assert "Traceback" not in running.log


@pytest.mark.parametrize("more", [0, 2, 4])
def test_a_controller_without_descriptors(service: Start, tmp_path: Path, more: int) -> None:
    running = service(DISKS.format(tmp_path))
    worker = running.workers()[0]
    with few_descriptors(running.process.pid, more):
        worker.kill()
        running.await_line("worker core 0 was ended by signal 9")
        time.sleep(SHORT_SECONDS)
    running.await_true(lambda: running.workers().get(0, worker) != worker)
    check_all_serve(running, tmp_path)
    assert "Traceback" not in running.log


@pytest.mark.parametrize("more", [4, 16])
def test_a_worker_without_memory(service: Start, tmp_path: Path, more: int) -> None:
    running = service(DISKS.format(tmp_path))
    worker = running.workers()[0]
    failures = 0
    clients = [Client(tmp_path / name, name) for name in NAMES]
    try:
        with little_memory(worker.pid, more * MIB):
            for client in clients:
                failures += sum(not_served(client, size * MIB) for size in (1, 8, 32))
                failures += many_not_served(client)
            assert start_scratch(running, tmp_path) in (-errno.ENOMEM, 0)
    finally:
        for client in clients:
            client.close()
    assert failures, "there was memory after all"
    check_all_serve(running, tmp_path)
    assert "Traceback" not in running.log


def not_served(client: Client, size: int) -> int:
    """Return how many of a write and a read fail: with ENOMEM, or as the connection ends."""
    failures = 0
    for request in (lambda: client.write(0, bytes(size)), lambda: client.read(0, size)):
        try:
            request()
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.ECONNRESET, errno.EPIPE):
                raise
            failures += 1
    return failures


def many_not_served(client: Client) -> int:
    """Return how many of 100 reads fail that are in flight together."""
    try:
        for index in range(100):
            client.submit(0, index << 18, 1 << 18)
        errors = [error for _, error, _ in client.finish(100)]
    except ConnectionError:
        return 1
    assert set(errors) <= {0, errno.ENOMEM}
    return sum(error != 0 for error in errors)


@pytest.mark.parametrize("more", [4, 16])
def test_a_controller_without_memory(service: Start, tmp_path: Path, more: int) -> None:
    # Its workers inherit the limit: what is spawned meanwhile may fail and is replaced later.
    running = service(DISKS.format(tmp_path))
    worker = running.workers()[0]
    with little_memory(running.process.pid, more * MIB):
        for _ in range(20):
            running.rpc("reactor_get_disks")
        start_scratch(running, tmp_path)
        worker.kill()
        running.await_line("worker core 0 was ended by signal 9")
        time.sleep(SHORT_SECONDS)
    assert running.process.poll() is None
    if running.workers().get(0) is not None:
        running.workers()[0].kill()
    running.await_true(lambda: running.workers().get(0, worker) != worker)
    for name in NAMES:
        running.rpc("reactor_start_disk", name=name)
    check_all_serve(running, tmp_path)
    assert "Traceback" not in running.log

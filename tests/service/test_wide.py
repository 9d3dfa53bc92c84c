"""Disks that several workers serve: who serves whom, and what holds when one of them dies."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from tests.client import Client
from tests.commands import ctl
from tests.descriptors import open_files
from tests.running import RunningService

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")

Start = Callable[..., RunningService]
MIB = 1 << 20
CORES = sorted(os.sched_getaffinity(0))[:2]
BOTH = ",".join(map(str, CORES))


def wide(tmp_path: Path, backend: str = "malloc", name: str = "w", more: str = "") -> str:
    """Return a config of one disk of 8 MiB on two workers."""
    keys = {"malloc": "", "file": f", path: {tmp_path}/image"}[backend]
    return (
        f"disks:\n  {name}: {{backend: {backend}{keys}, size: 8MiB, connections: 2,"
        f" listen: 'unix:{tmp_path}/{name}.sock'{more}}}\n"
    )


@pytest.fixture(params=["malloc", "file"])
def running(request: pytest.FixtureRequest, service: Start, tmp_path: Path) -> RunningService:
    return service(wide(tmp_path, request.param), cores=BOTH)


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., list[Client]]]:
    with ExitStack() as stack:

        def connect(count: int = 2, name: str = "w") -> list[Client]:
            path = tmp_path / f"{name}.sock"
            return [stack.enter_context(Client(path, name)) for _ in range(count)]

        yield connect


Connect = Callable[..., list[Client]]


def count(running: RunningService, counter: str) -> int | None:
    """Return a counter of the disk, None before its workers have told it."""
    counters: dict[str, int] = running.rpc("reactor_get_disks", name="w")[0]["statistics"]
    return counters.get(counter)


def clients_of(tmp_path: Path, worker: psutil.Process) -> int:
    """Return how many clients a worker serves on the disk's socket."""
    connected = {
        f"socket:[{fields[6]}]"
        for fields in map(str.split, Path("/proc/net/unix").read_text().splitlines())
        if fields[7:] == [f"{tmp_path}/w.sock"] and fields[5] == "03"
    }
    return sum(file in connected for file in open_files(worker.pid))


def connect_both(
    running: RunningService, tmp_path: Path, connect: Connect
) -> tuple[Client, Client]:
    """Return a client of the owner and one of the member, which for a while may be given none."""
    member = running.workers()[running.await_state("w", "online")["cores"][1]]
    clients = connect(1)

    def connected() -> bool:
        if len(clients) > 1:
            clients.pop().close()
        clients.extend(connect(1))
        clients[-1].read(0, 512)
        return clients_of(tmp_path, member) > 0

    running.await_true(connected)
    return clients[0], clients[1]


def test_it_is_open_on_both_workers(running: RunningService) -> None:
    disk = running.await_state("w", "online")
    assert sorted(disk["cores"]) == CORES
    assert disk["core"] == disk["cores"][0]
    assert [worker["disks"] for worker in running.rpc("reactor_get_workers")] == [["w"], ["w"]]
    assert f"core {','.join(map(str, disk['cores']))}" in ctl(running.runtime_dir, "show", "w")


def test_clients_are_spread_and_see_each_others_writes(
    running: RunningService, tmp_path: Path, connect: Connect
) -> None:
    clients = connect(4)
    assert clients[0].export is not None
    assert clients[0].export.flags & 256, "CAN_MULTI_CONN"
    for number, client in enumerate(clients):
        client.write(number * MIB, bytes([65 + number]) * MIB)
    clients[3].flush()
    for client in clients:
        for number in range(4):
            assert client.read(number * MIB, MIB) == bytes([65 + number]) * MIB
    workers = running.workers().values()
    running.await_true(lambda: [clients_of(tmp_path, worker) for worker in workers] == [2, 2])
    running.await_true(lambda: count(running, "written_bytes") == 4 * MIB)
    assert count(running, "connections") == 4
    clients[1].close()
    clients[3].close()
    running.await_true(lambda: count(running, "connections") == 2)
    for client in connect(2):
        client.read(0, 512)
    running.await_true(lambda: [clients_of(tmp_path, worker) for worker in workers] == [2, 2])


def test_what_a_client_sent_with_its_handshake_goes_with_it(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path), cores=BOTH)
    connect(1)[0].write(0, b"t" * 4096)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(30)
        sock.connect(f"{tmp_path}/w.sock")
        sock.recv(18, socket.MSG_WAITALL)
        read = struct.pack(">IHHQQI", 0x25609513, 0, 0, 7, 0, 4096)
        sock.sendall(struct.pack(">IQIIIH", 3, 0x49484156454F5054, 7, 6, 0, 0) + read)
        reply = struct.pack(">IIQ", 0x67446698, 0, 7) + b"t" * 4096
        received = b""
        while not received.endswith(reply):
            received += sock.recv(65536)
        workers = running.workers().values()
        running.await_true(lambda: [clients_of(tmp_path, worker) for worker in workers] == [1, 1])


@pytest.mark.parametrize("victim", [0, 1], ids=["owner", "member"])
def test_a_killed_worker_takes_only_its_own_clients(
    running: RunningService, tmp_path: Path, connect: Connect, victim: int
) -> None:
    disk = running.await_state("w", "online")
    owner, member = connect_both(running, tmp_path, connect)
    member.write(4096, b"m" * 4096)
    owner.write(0, b"o" * 4096)
    dies, lives = (owner, member) if victim == 0 else (member, owner)
    worker = running.workers()[disk["cores"][victim]]
    worker.kill()
    assert dies.at_end()
    for _ in range(100):
        assert lives.read(0, 8192) == b"o" * 4096 + b"m" * 4096
    running.await_line("was ended by signal 9")
    running.await_true(lambda: len(running.workers()) == 2)
    again = running.await_state("w", "online")
    assert again["cores"] == disk["cores"]
    assert again["reason"] == ""
    for client in connect(2):
        assert client.read(0, 8192) == b"o" * 4096 + b"m" * 4096
    assert lives.read(0, 4096) == b"o" * 4096


def test_a_core_without_worker_is_done_without(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    """Whoever holds its lock, the worker cannot start: here the one of the disk's owner."""
    runtime_dir = tmp_path / "run"
    runtime_dir.mkdir(mode=0o700)
    with (runtime_dir / f"worker-{CORES[0]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = service(wide(tmp_path), cores=BOTH, runtime_dir=runtime_dir)
        assert running.await_line(f"disk w does without core {CORES[0]}")
        disk = running.await_state("w", "online")
        assert disk["cores"] == [CORES[1]]
        for client in connect(2):
            client.write(0, b"x" * 512)
    running.rpc("reactor_start_disk", name="w")
    running.await_true(lambda: len(running.workers()) == 2)
    assert sorted(running.await_state("w", "online")["cores"]) == CORES


def test_a_worker_that_hangs_is_replaced_and_its_clients_alone_are_lost(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path), cores=BOTH)
    owner, member = connect_both(running, tmp_path, connect)
    running.workers()[running.await_state("w", "online")["cores"][1]].send_signal(signal.SIGSEGV)
    assert member.at_end()
    owner.write(0, b"x" * 512)
    running.await_true(lambda: len(running.workers()) == 2)
    running.await_state("w", "online")


def test_new_clients_are_served_while_a_worker_comes_back(
    running: RunningService, connect: Connect
) -> None:
    connect(1)[0].write(0, b"k" * 4096)
    disk = running.await_state("w", "online")
    for _ in range(2):
        old = running.workers()[disk["cores"][1]]
        old.kill()
        came_back = False
        while not came_back:
            workers, state = running.workers(), running.rpc("reactor_get_disks")[0]["state"]
            came_back = workers.get(disk["cores"][1], old) != old and state == "online"
            for client in connect(4):
                assert client.read(0, 4096) == b"k" * 4096
                client.close()


def test_clients_for_a_worker_that_hangs_are_served_by_another(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path), cores=BOTH)
    first = connect(1)[0]
    first.write(0, b"k" * 4096)
    member = running.workers()[running.await_state("w", "online")["cores"][1]]
    member.suspend()
    try:
        for client in connect(8):
            assert client.read(0, 4096) == b"k" * 4096
    finally:
        member.resume()
    running.await_line("did not take a client")
    running.await_true(lambda: clients_of(tmp_path, member) == 0)
    for client in connect(1):
        client.write(0, b"n" * 4096)
    assert first.read(0, 4096) == b"n" * 4096


def test_the_owner_that_was_done_without_leads_again(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    """Its core's other disks share the listener, which only one process can have."""
    listener = f"core: {CORES[0]}, listen: 'unix:{tmp_path}/w.sock'"
    config = f"disks:\n  w: {{backend: malloc, size: 8MiB, connections: 2, {listener}}}\n"
    running = service(config, cores=BOTH)
    lock_path = running.runtime_dir / f"worker-{CORES[0]}.lock"
    with lock_path.open("r+") as lock:
        running.workers()[CORES[0]].kill()
        fcntl.flock(lock, fcntl.LOCK_EX)
        running.await_line(f"disk w does without core {CORES[0]}")
        assert running.await_state("w", "online")["cores"] == [CORES[1]]
        kept = connect(1)[0]
        kept.write(0, b"k" * 4096)
    running.rpc("reactor_start_disk", name="w")
    assert running.await_state("w", "online")["cores"] == CORES
    keys = {"backend": "malloc", "size": "1MiB", "core": CORES[0]}
    keys["listen"] = f"unix:{tmp_path}/w.sock"
    running.rpc("reactor_start_disk", name="n", keys=keys)
    for client in connect(2):
        assert client.read(0, 4096) == b"k" * 4096
    kept.write(0, b"l" * 4096)


def test_resize_reaches_every_worker(running: RunningService, connect: Connect) -> None:
    old = connect(2)
    for size in (16 * MIB, 4 * MIB, 12 * MIB):
        running.rpc("reactor_resize_disk", name="w", size=size)
        for client in connect(2):
            assert client.size == size
            client.write(size - 4096, b"e" * 4096)
        for client in old:
            assert client.read(size - 4096, 4096) == b"e" * 4096
            with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
                client.read(size, 4096)
        if size == 12 * MIB:
            assert not any(old[0].read(4 * MIB, 4 * MIB)), "what it gained reads as zeroes"
    assert running.await_state("w", "online")["size"] == 12 * MIB


def test_a_worker_that_dies_after_a_resize_comes_back_with_the_new_size(
    running: RunningService, connect: Connect
) -> None:
    running.rpc("reactor_resize_disk", name="w", size=16 * MIB)
    old = running.workers()
    for worker in old.values():
        worker.kill()
    running.await_true(
        lambda: all(running.workers().get(core, old[core]) != old[core] for core in old)
    )
    running.await_state("w", "online")
    for client in connect(2):
        assert client.size == 16 * MIB


def all_show(connect: Connect, size: int) -> Callable[[], bool]:
    """Return whether clients of every worker are told `size` and can read up to it."""

    def check() -> bool:
        clients = connect(4)
        sizes = {client.size for client in clients}
        if sizes == {size}:
            assert all(len(client.read(size - 4096, 4096)) == 4096 for client in clients)
        for client in clients:
            client.close()
        return sizes == {size}

    return check


def test_a_refused_shrink_changes_no_worker(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    (tmp_path / "image").write_bytes(bytes(8 * MIB))
    running = service(wide(tmp_path, "file", more=", readonly: true"), cores=BOTH)
    clients = connect(2)
    for _ in range(2):
        answer = running.rpc_raw("reactor_resize_disk", name="w", size=MIB)
        assert "read-only" in answer["error"]["message"]
        running.await_true(all_show(connect, 8 * MIB))
        for client in clients:
            assert client.read(7 * MIB, MIB) == bytes(MIB)
    assert running.await_state("w", "online")["size"] == 8 * MIB


def test_after_a_refused_resize_a_member_can_be_done_without(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    """The file is larger than its `size`: what is shown is not what the config says."""
    (tmp_path / "image").write_bytes(bytes(16 * MIB))
    running = service(wide(tmp_path, "file", more=f", core: {CORES[0]}"), cores=BOTH)
    assert "error" in running.rpc_raw("reactor_resize_disk", name="w", size=1 << 62)
    (client,) = connect(1)
    with (running.runtime_dir / f"worker-{CORES[1]}.lock").open("r+") as lock:
        running.workers()[CORES[1]].kill()
        fcntl.flock(lock, fcntl.LOCK_EX)  # so that it cannot start again
        running.await_line(f"disk w does without core {CORES[1]}")
        disk = running.await_state("w", "online")
    assert (disk["cores"], disk["size"]) == ([CORES[0]], 16 * MIB)
    assert client.read(16 * MIB - 4096, 4096) == bytes(4096)


@pytest.mark.parametrize("victim", [0, 1], ids=["owner", "member"])
def test_a_worker_that_finds_the_file_grown_shows_what_the_others_do(
    service: Start, tmp_path: Path, connect: Connect, victim: int
) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * MIB))
    running = service(wide(tmp_path, "file").replace(" size: 8MiB,", ""), cores=BOTH)
    core = running.await_state("w", "online")["cores"][victim]
    os.truncate(image, 16 * MIB)
    before = running.workers()[core]
    before.kill()
    running.await_true(lambda: running.workers().get(core, before) != before)
    assert running.await_state("w", "online")["size"] == 8 * MIB
    running.await_true(all_show(connect, 8 * MIB))


def test_a_reload_grows_a_disk_while_one_of_its_workers_restarts(
    running: RunningService, tmp_path: Path, connect: Connect
) -> None:
    owner, member = connect_both(running, tmp_path, connect)
    owner.write(0, b"k" * 4096)
    config = running.config_path.read_text()
    running.config_path.write_text(config.replace("8MiB", "16MiB"))
    running.workers()[running.await_state("w", "online")["cores"][1]].kill()
    running.await_line("was ended by signal 9")
    running.rpc("reactor_reload")
    assert member.at_end()
    running.await_true(lambda: running.rpc("reactor_get_disks", name="w")[0]["size"] == 16 * MIB)
    running.await_true(all_show(connect, 16 * MIB))
    assert owner.read(0, 4096) == b"k" * 4096, "its client was not cut off"
    assert not any(owner.read(16 * MIB - 4096, 4096))


def test_a_member_that_hangs_does_not_keep_the_owner_from_coming_back(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path), cores=BOTH)
    owner, member = (running.workers()[c] for c in running.await_state("w", "online")["cores"])
    member.suspend()
    answers: list[dict[str, Any]] = []
    resize = Thread(
        target=lambda: answers.append(
            running.rpc_raw("reactor_resize_disk", name="w", size=16 * MIB)
        )
    )
    resize.start()
    running.await_true(lambda: running.rpc("reactor_get_disks", name="w")[0]["size"] == 16 * MIB)
    owner.kill()
    running.await_line("waits for its answer, and another worker for the disk")
    resize.join()
    assert "error" not in answers[0]
    running.await_state("w", "online")
    running.await_true(all_show(connect, 16 * MIB))


def test_hot_remove_ends_the_clients_of_all_workers(
    running: RunningService, tmp_path: Path, connect: Connect
) -> None:
    clients = connect(4)
    running.rpc("reactor_remove_disk", name="w")
    for client in clients:
        assert client.at_end()
    assert running.rpc("reactor_get_disks") == []
    assert not (tmp_path / "w.sock").exists()


def test_a_deleted_file_removes_the_disk(service: Start, tmp_path: Path, connect: Connect) -> None:
    running = service(wide(tmp_path, "file"), cores=BOTH)
    clients = connect(4)
    (tmp_path / "image").unlink()
    assert "was deleted" in running.await_state("w", "removed")["reason"]
    for client in clients:
        assert client.at_end()


def test_stop_and_start(running: RunningService, connect: Connect) -> None:
    first, second = connect(2)
    second.write(0, b"k" * 4096)
    running.rpc("reactor_stop_disk", name="w")
    assert first.at_end()
    assert second.at_end()
    running.rpc("reactor_start_disk", name="w")
    for client in connect(2):
        assert client.read(0, 4096) == b"k" * 4096


def test_a_reload_makes_a_disk_wide_and_narrow_again(
    running: RunningService, connect: Connect
) -> None:
    connect(1)[0].write(0, b"k" * 4096)
    config = running.config_path.read_text()
    for connections, cores in ((1, 1), (2, 2), (1, 1)):
        running.config_path.write_text(config.replace(" 2,", f" {connections},"))
        running.rpc("reactor_reload")
        disk = running.await_state("w", "online")
        assert len(disk["cores"]) == cores
        running.await_state("w", "online")
        for client in connect(2):
            assert client.read(0, 4096) == b"k" * 4096


def test_one_core_serves_it_alone(service: Start, tmp_path: Path, connect: Connect) -> None:
    running = service(wide(tmp_path).replace(" 2,", " 4,"), cores=str(CORES[0]))
    assert running.await_state("w", "online")["cores"] == [CORES[0]]
    first, second = connect(2)
    first.write(0, b"k" * 512)
    assert second.read(0, 512) == b"k" * 512


def test_a_second_service_is_refused_the_file(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path, "file"), cores=BOTH)
    for more in (wide(tmp_path, "file", "v"), wide(tmp_path, "file", "v").replace(" 2,", " 1,")):
        other = service(more, cores=BOTH)
        line = other.await_line("disk v failed:")
        assert line.endswith(f"{tmp_path}/image: is in use by another disk or service")
        other.stop()
    connect(1)[0].write(0, b"x" * 512)
    running.await_state("w", "online")


def test_a_trim_in_one_worker_is_seen_by_the_other(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path), cores=BOTH)
    first, second = connect(2)
    for _ in range(20):
        first.write(0, b"x" * (8 * MIB))
        assert second.read(0, 8 * MIB) == b"x" * (8 * MIB)
        second.trim(MIB, 2 * MIB)
        second.write_zeroes(4 * MIB - 512, MIB + 1024)
        assert not any(first.read(MIB, 2 * MIB))
        assert first.read(4 * MIB - 1024, 512) == b"x" * 512
        assert not any(first.read(4 * MIB - 512, MIB + 1024))
    assert sorted(running.rpc("reactor_get_disks")[0]["cores"]) == CORES


def dirty_pages(path: Path) -> int:
    """Return how many pages of a file are still to be written back (cachestat, Linux 6.5)."""
    whole, answer = struct.pack("=QQ", 0, 1 << 62), ctypes.create_string_buffer(40)
    with path.open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).syscall(451, file.fileno(), whole, answer, 0) < 0:
            pytest.skip("this kernel cannot tell")
    _cached, dirty, writeback, _, _ = struct.unpack("=5Q", answer.raw)
    return int(dirty + writeback)


def test_a_flush_at_one_worker_covers_writes_at_the_other(
    service: Start, tmp_path: Path, connect: Connect
) -> None:
    running = service(wide(tmp_path, "file"), cores=BOTH)
    clients = connect_both(running, tmp_path, connect)
    for writer, flusher in ((0, 1), (1, 0)):
        clients[writer].write(0, b"d" * MIB)
        if not dirty_pages(tmp_path / "image"):
            pytest.skip("this file system keeps no dirty pages")
        clients[flusher].flush()
        assert dirty_pages(tmp_path / "image") == 0

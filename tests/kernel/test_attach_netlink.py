"""Devices by netlink on a real kernel: they come, carry I/O, survive their server, and go."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reactor.attach import sysfs
from reactor.attach.device import DEVICE_IO, Device, adopt, attach, held
from reactor.attach.netlink import IO_TIMEOUT_MS, NetlinkDevice
from reactor.errors import DeviceError
from reactor.protocol import wire
from reactor.spec import AttachWay
from tests.deviceio import device_io, stopped
from tests.kernel.conftest import FLAGS_ALL, MIB, SIZE, Attach, Server

pytestmark = pytest.mark.kernel

BLKGETSIZE64 = 0x80081272
TAG = "nbd-reactor:test:memory"
WAIT_SECONDS = 20


def queue(device: Device, name: str) -> str:
    return Path(f"/sys/block/nbd{device.index}/queue/{name}").read_text().strip()


def size_of(path: str) -> int:
    with Path(path).open("rb") as node:
        answer = fcntl.ioctl(node, BLKGETSIZE64, bytes(8))
    return int.from_bytes(answer, sys.byteorder)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def write(path: str, byte: bytes, length: int = 4096, flags: int = os.O_DIRECT) -> None:
    fd = os.open(path, os.O_RDWR | flags)
    try:
        with mmap.mmap(-1, length) as buffer:
            buffer.write(byte * length)
            assert os.pwritev(fd, [buffer], 0) == length
    finally:
        os.close(fd)


class Write(threading.Thread):
    """A write in a thread; `error` is what it ended with."""

    def __init__(self, path: str, byte: bytes, length: int = 4096) -> None:
        super().__init__()
        self.error: OSError | None = None
        self._path, self._byte, self._length = path, byte, length
        self.start()

    def run(self) -> None:
        try:
            write(self._path, self._byte, self._length)
        except OSError as error:
            self.error = error

    def waits_for_the_kernel(self) -> bool:
        # The driver keeps what it cannot send at all: sysfs does not count that as in flight.
        state = Path(f"/proc/self/task/{self.native_id}/stat").read_text().rpartition(")")[2]
        return state.split()[0] == "D"

    def end(self) -> None:
        self.join(WAIT_SECONDS)
        assert not self.is_alive()


@contextmanager
def write_in_flight(
    server: Server, device: Device, byte: bytes, length: int = 4096
) -> Iterator[Write]:
    device.probe()  # the first open of a device looks for partitions: not the I/O that is meant
    if device.can_reconnect:  # it is set by and by
        wait_until(lambda: sysfs.io_timeout(device.index) == IO_TIMEOUT_MS)
    server.stall()
    writing = Write(device.path, byte, length)
    wait_until(lambda: sysfs.in_flight(device.index))
    yield writing
    writing.end()


def reconnect(server: Server, device: Device, connections: int = 1) -> None:
    """Reconnect as the controller does: new pairs for each try."""
    for _ in range(100):
        pairs = [socket.socketpair() for _ in range(connections)]
        try:
            device.reconnect([kernel for kernel, _ in pairs], [worker for _, worker in pairs])
        except DeviceError as error:
            for _, worker_end in pairs:
                worker_end.close()
            if error.errno != errno.EAGAIN:
                raise
            time.sleep(0.02)
        else:
            for _, worker_end in pairs:
                server.serve(worker_end)
            return
    raise AssertionError("the kernel never took the sockets")


def come_and_go(server: Server, way: AttachWay, times: int) -> None:
    """Attach a device and detach it, again and again."""
    for _ in range(times):
        device = attach(
            "/dev/nbd0",
            "auto" if way == "netlink" else way,
            tag=TAG,
            size=SIZE,
            block_size=512,
            flags=FLAGS_ALL,
            kernel_ends=[server.connect()],
            timeout=None,
            dead_timeout=60,
        )
        assert (device.path, device.way, sysfs.size(0)) == ("/dev/nbd0", way, SIZE)
        device.detach()
        assert sysfs.is_free(0)


def test_a_hundred_devices_come_and_go(server: Server) -> None:
    come_and_go(server, "netlink", 100)


def test_what_is_written_to_the_device_is_in_the_disk(server: Server, attached: Attach) -> None:
    device = attached()
    device.probe()
    write(device.path, b"a", flags=0)
    device.flush()
    assert server.disk.data[:4096] == b"a" * 4096
    assert (wire.NBD_CMD_FLUSH, 0) in server.disk.seen


def test_auto_takes_the_first_free_device(attached: Attach) -> None:
    attached("/dev/nbd0")
    assert attached("auto").path == "/dev/nbd1"
    assert attached("auto").path == "/dev/nbd2"


def test_a_device_beyond_those_that_exist_is_made(attached: Attach) -> None:
    index = max(sysfs.indexes()) + 1
    device = attached(f"/dev/nbd{index}")
    device.probe()
    assert device.index == index


def test_the_kernel_learns_what_the_disk_can(server: Server, attached: Attach) -> None:
    device = attached()
    assert queue(device, "write_cache") == "write back"
    assert queue(device, "fua") == "1"
    assert int(queue(device, "discard_max_bytes")) > 0
    assert queue(device, "logical_block_size") == "512"
    write(device.path, b"a", flags=os.O_DIRECT | os.O_DSYNC)
    assert (wire.NBD_CMD_WRITE, wire.NBD_CMD_FLAG_FUA) in server.disk.seen


def test_a_read_only_disk_refuses_writes_in_the_kernel(server: Server, attached: Attach) -> None:
    server.flags = FLAGS_ALL | wire.NBD_FLAG_READ_ONLY
    device = attached(block_size=4096)
    device.probe()
    assert Path(f"/sys/block/nbd{device.index}/ro").read_text().strip() == "1"
    assert queue(device, "discard_max_bytes") == "0"
    assert queue(device, "logical_block_size") == "4096"
    with pytest.raises(OSError, match="not permitted"):
        write(device.path, b"a")


def test_a_disk_without_flush_has_no_cache_to_write_back(server: Server, attached: Attach) -> None:
    server.flags = wire.NBD_FLAG_HAS_FLAGS
    device = attached()
    assert queue(device, "write_cache") == "write through"
    assert queue(device, "discard_max_bytes") == "0"


@pytest.mark.parametrize(
    ("timeout", "connections", "expected"),
    [(None, 1, 1000), (5, 1, 5000), (None, 2, 10000), (0, 2, 10000), (7, 2, 7000)],
)
def test_requests_are_asked_for_every_second_unless_that_would_fail_slow_ones(
    server: Server, attached: Attach, timeout: int | None, connections: int, expected: int
) -> None:
    server.flags = FLAGS_ALL | wire.NBD_FLAG_CAN_MULTI_CONN
    device = attached(timeout=timeout, connections=connections)
    wait_until(lambda: int(queue(device, "io_timeout")) == expected)
    device.probe()


def test_what_could_not_be_set_in_a_shortage_is_set_later(attached: Attach) -> None:
    device = attached()
    wait_until(lambda: queue(device, "io_timeout") == "1000")
    Path(f"/sys/block/nbd{device.index}/queue/io_timeout").write_text("30000")
    device.probe()
    wait_until(lambda: queue(device, "io_timeout") == "1000")


def test_a_write_in_flight_survives_its_server(server: Server, attached: Attach) -> None:
    device = attached()
    with write_in_flight(server, device, b"b") as writing:
        server.die()
        server.disk.data[:4096] = bytes(4096)
        reconnect(server, device)
    assert writing.error is None
    assert server.disk.data[:4096] == b"b" * 4096


def test_a_write_without_a_server_waits_for_the_next(server: Server, attached: Attach) -> None:
    device = attached()
    server.die()
    writing = Write(device.path, b"c")
    wait_until(writing.waits_for_the_kernel)
    reconnect(server, device)
    writing.end()
    assert writing.error is None
    assert server.disk.data[:4096] == b"c" * 4096


def test_many_deaths_in_a_row_lose_nothing(server: Server, attached: Attach) -> None:
    device = attached()
    for round_ in range(10):
        server.die()
        reconnect(server, device)
        write(device.path, bytes([round_]))
        assert server.disk.data[:4096] == bytes([round_]) * 4096


def test_several_connections_are_reconnected_together(server: Server, attached: Attach) -> None:
    server.flags = FLAGS_ALL | wire.NBD_FLAG_CAN_MULTI_CONN
    device = attached(connections=2)
    server.die()
    reconnect(server, device, 2)
    device.probe()


def test_a_living_connection_is_not_replaced(attached: Attach) -> None:
    device = attached()
    kernel_end, worker_end = socket.socketpair()
    with worker_end, pytest.raises(DeviceError) as caught:
        device.reconnect([kernel_end], [worker_end])
    assert caught.value.errno == errno.EAGAIN
    assert kernel_end.fileno() == -1
    device.probe()


def test_the_size_follows_in_both_directions(attached: Attach) -> None:
    device = attached()
    for size in (SIZE // 2, SIZE):
        device.resize(size, 512)
        assert size_of(device.path) == size


def test_the_next_process_adopts_the_device(server: Server, attached: Attach) -> None:
    first = attached()
    assert held("nbd-reactor:test:") == [TAG]
    assert held("nbd-reactor:other:") == []
    assert adopt("nbd-reactor:test:mem") is None
    server.die()
    second = adopt(TAG)
    assert second is not None
    assert second.path == first.path
    reconnect(server, second)
    second.probe()
    second.detach()
    assert sysfs.is_free(first.index)


def test_a_device_outlives_the_process_that_attached_it(server: Server) -> None:
    code = f"""
import socket, sys
from reactor.attach.device import attach
attach("/dev/nbd3", "netlink", tag={TAG!r}, size={SIZE}, block_size=512, flags={FLAGS_ALL},
       kernel_ends=[socket.socket(fileno=int(sys.argv[1]))], timeout=None, dead_timeout=60)
"""
    with server.connect() as kernel_end:
        fd = kernel_end.fileno()
        subprocess.run([sys.executable, "-c", code, str(fd)], pass_fds=[fd], check=True)
    device = adopt(TAG)
    assert device is not None
    device.probe()
    device.detach()


def test_nobody_waits_until_the_kernel_has_taken_how_often_to_ask(
    monkeypatch: pytest.MonkeyPatch, attached: Attach
) -> None:
    """Since Linux 6.11 that first waits for the requests in flight, which may wait for us."""
    DEVICE_IO.await_start()
    with stopped(device_io()):
        device = attached()
        assert adopt(TAG, patient=True) is not None
        assert queue(device, "io_timeout") == "30000"
    wait_until(lambda: queue(device, "io_timeout") == "1000")
    device.probe()
    asked: list[object] = []
    monkeypatch.setattr(DEVICE_IO, "ask", lambda *asking: asked.append(asking))
    assert adopt(TAG, patient=True) is not None
    assert not asked


def test_another_programs_tag_protects_its_device(server: Server, attached: Attach) -> None:
    theirs = attached(tag="nbd-reactor:other:memory")
    ours = NetlinkDevice(theirs.index, TAG)
    kernel_end, worker_end = socket.socketpair()
    tries: list[Callable[[], None]] = [
        ours.detach,
        lambda: ours.resize(MIB, 512),
        lambda: ours.reconnect([kernel_end], [worker_end]),
    ]
    for try_ in tries:
        with pytest.raises(DeviceError, match="belongs to nbd-reactor:other:memory") as caught:
            try_()
        assert caught.value.errno == errno.EBUSY
    worker_end.close()
    assert sysfs.size(theirs.index) == SIZE
    theirs.probe()


def test_the_kernel_itself_refuses_another_tag(attached: Attach) -> None:
    device = attached()
    impostor = NetlinkDevice(device.index, "nbd-reactor:other:memory")
    impostor._check_ours = lambda: None  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="the kernel refuses it"):
        impostor.resize(MIB, 512)
    device.probe()


def test_detaching_without_a_server_fails_what_waits(server: Server, attached: Attach) -> None:
    device = attached()
    with write_in_flight(server, device, b"d") as writing:
        server.die()
        device.detach()
    assert writing.error is not None
    assert writing.error.errno == errno.EIO
    assert sysfs.is_free(device.index)


def test_detaching_waits_for_a_stalled_server_only_until_it_ends(
    server: Server, attached: Attach
) -> None:
    device = attached()
    with write_in_flight(server, device, b"d", 4 * MIB) as writing:  # more than its socket holds
        detaching = threading.Thread(target=device.detach)
        detaching.start()
        server.die()
        detaching.join(WAIT_SECONDS)
        assert not detaching.is_alive()
    assert writing.error is not None
    assert sysfs.is_free(device.index)


def test_detaching_twice_is_harmless(attached: Attach) -> None:
    device = attached()
    device.detach()
    device.detach()


def test_a_device_that_is_gone_says_so(attached: Attach) -> None:
    device = attached()
    device.detach()
    with pytest.raises(DeviceError, match="not attached any more") as caught:
        device.resize(MIB, 512)
    assert caught.value.errno == errno.ENODEV


def test_a_device_that_is_still_open_is_named_with_its_user(
    server: Server, attached: Attach
) -> None:
    device = attached()
    with Path(device.path).open("rb"):
        with pytest.raises(DeviceError, match=r"stays in use until .*python") as caught:
            device.detach()
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(DeviceError) as again:
            attached(device.path)
        assert again.value.errno == errno.EBUSY
        for change in (lambda: reconnect(server, device), lambda: device.resize(MIB, 512)):
            with pytest.raises(DeviceError, match="is disconnected, but stays in use until"):
                change()
    wait_until(lambda: sysfs.is_free(device.index))
    attached(device.path).probe()


def test_what_is_disconnected_and_still_open_is_not_adopted_in_place_of_what_serves(
    attached: Attach,
) -> None:
    left = attached()
    with Path(left.path).open("rb"):
        with pytest.raises(DeviceError, match="stays in use"):
            left.detach()
        device = attached()
        found = adopt(TAG)
        assert found is not None
        assert found.path == device.path != left.path
        found.probe()


def test_a_failing_disk_is_found_by_the_probe(server: Server, attached: Attach) -> None:
    device = attached()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "bad sector")

    server._channel.read = fail  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="cannot be read") as caught:
        device.probe()
    assert caught.value.errno == errno.EIO

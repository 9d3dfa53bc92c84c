"""Devices by ioctl on a real kernel: they live and end with this process and their server."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reactor.attach import ioctl, sysfs
from reactor.errors import DeviceError
from reactor.protocol import wire
from tests.kernel.conftest import FLAGS_ALL, MIB, SIZE, Attach, Server
from tests.kernel.test_attach_netlink import (
    come_and_go,
    size_of,
    wait_until,
    write,
    write_in_flight,
)
from tests.shortages import little_memory

pytestmark = pytest.mark.kernel

TAG = "nbd-reactor:test:memory"
THREAD_STACK = 64 * MIB  # more than any that the C library keeps for the next thread


def test_twenty_devices_come_and_go(server: Server) -> None:
    come_and_go(server, "ioctl", 20)


def test_what_is_written_to_the_device_is_in_the_disk(server: Server, attached: Attach) -> None:
    device = attached(way="ioctl")
    device.probe()
    write(device.path, b"a", flags=os.O_DIRECT | os.O_DSYNC)
    assert server.disk.data[:4096] == b"a" * 4096
    assert (wire.NBD_CMD_WRITE, wire.NBD_CMD_FLAG_FUA) in server.disk.seen
    write(device.path, b"b", flags=0)
    device.flush()
    assert server.disk.data[:4096] == b"b" * 4096


def test_auto_takes_the_first_free_device(attached: Attach) -> None:
    attached("/dev/nbd0", way="netlink")
    with Path("/dev/nbd1").open("rb"):
        assert attached("auto", way="ioctl").path == "/dev/nbd2"
    assert attached("auto", way="ioctl").path == "/dev/nbd1"


@pytest.mark.parametrize("size", [SIZE, (1 << 43) + 512])
def test_sizes_pass_unharmed(attached: Attach, size: int) -> None:
    assert sysfs.size(attached(way="ioctl", size=size).index) == size


def test_the_size_follows_in_both_directions(attached: Attach) -> None:
    device = attached(way="ioctl")
    for size in (SIZE // 2, SIZE):
        device.resize(size, 512)
        assert size_of(device.path) == size


def test_several_connections_are_served(server: Server, attached: Attach) -> None:
    server.flags = FLAGS_ALL | wire.NBD_FLAG_CAN_MULTI_CONN
    device = attached(way="ioctl", connections=2)
    device.probe()


def test_a_dead_server_fails_what_is_in_flight_and_frees_the_device(
    server: Server, attached: Attach
) -> None:
    device = attached(way="ioctl")
    with write_in_flight(server, device, b"a") as writing:
        server.die()
    assert writing.error is not None
    assert writing.error.errno == errno.EIO
    wait_until(lambda: sysfs.is_free(device.index))
    device.detach()
    with pytest.raises(DeviceError, match="not attached any more"):
        device.resize(SIZE // 2, 512)
    attached(device.path, way="ioctl").probe()


def test_no_new_socket_can_be_given(attached: Attach) -> None:
    device = attached(way="ioctl")
    kernel_end, worker_end = socket.socketpair()
    with worker_end, pytest.raises(DeviceError) as caught:
        device.reconnect([kernel_end], [worker_end])
    assert caught.value.errno == errno.EOPNOTSUPP
    assert kernel_end.fileno() == -1
    device.probe()


def test_a_server_that_does_not_answer_is_cut(
    server: Server, attached: Attach, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ioctl, "STOP_SECONDS", 1.0)
    device = attached(way="ioctl")
    with write_in_flight(server, device, b"a") as writing:
        device.detach()
    server.resume()
    assert writing.error is not None
    assert sysfs.is_free(device.index)


@contextmanager
def no_memory_for_a_thread() -> Iterator[None]:
    before = threading.stack_size(THREAD_STACK)
    try:
        with little_memory(os.getpid(), THREAD_STACK // 2):
            yield
    finally:
        threading.stack_size(before)


def test_without_memory_for_a_thread_it_is_detached_all_the_same(
    attached: Attach, caplog: pytest.LogCaptureFixture
) -> None:
    device = attached(way="ioctl")
    device.probe()
    with no_memory_for_a_thread():
        device.detach()
    assert "no memory for a thread" in caplog.text
    assert sysfs.is_free(device.index)


def test_without_memory_for_a_thread_nothing_is_attached(attached: Attach) -> None:
    with no_memory_for_a_thread(), pytest.raises(DeviceError) as caught:
        attached("/dev/nbd0", way="ioctl")
    assert caught.value.errno == errno.ENOMEM
    assert sysfs.is_free(0)
    attached("/dev/nbd0", way="ioctl").probe()


def test_detaching_twice_is_harmless(attached: Attach) -> None:
    device = attached(way="ioctl")
    device.detach()
    device.detach()


def test_the_device_ends_with_its_process(server: Server) -> None:
    code = f"""
import socket, sys, time
from reactor.attach.device import attach
attach("/dev/nbd3", "ioctl", tag={TAG!r}, size={SIZE}, block_size=512, flags={FLAGS_ALL},
       kernel_ends=[socket.socket(fileno=int(sys.argv[1]))], timeout=None, dead_timeout=60)
print("up", flush=True)
time.sleep(1000)
"""
    with server.connect() as kernel_end:
        fd = kernel_end.fileno()
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(fd)], pass_fds=[fd], stdout=subprocess.PIPE
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        assert sysfs.size(3) == SIZE
        process.send_signal(signal.SIGKILL)
    wait_until(lambda: sysfs.is_free(3))

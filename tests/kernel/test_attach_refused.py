"""What cannot be attached: each case has its own clear message, and nobody's device is touched."""

from __future__ import annotations

import errno
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reactor.attach import sysfs
from reactor.attach.device import attach
from reactor.errors import DeviceError
from tests.commands import run
from tests.kernel.conftest import FLAGS_ALL, SIZE, Attach, Server

pytestmark = pytest.mark.kernel

WAYS = ["auto", "netlink", "ioctl"]
MIB = 1 << 20


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@contextmanager
def nbd_client(directory: Path, *options: str) -> Iterator[None]:
    """Have nbd-client hold /dev/nbd0, served by nbdkit."""
    address = directory / "sock"
    server = subprocess.Popen(["nbdkit", "-f", "-U", str(address), "memory", "4M"])
    try:
        while not address.exists():
            assert server.poll() is None
        run("nbd-client", "-unix", str(address), "/dev/nbd0", *options)
        yield
    finally:
        run("nbd-client", "-d", "/dev/nbd0")
        server.terminate()
        server.wait()


@pytest.mark.parametrize("option", ["-swap", "-nonetlink"])
def test_a_device_of_nbd_client_is_left_alone(
    attached: Attach, tmp_path: Path, way: str, option: str
) -> None:
    with nbd_client(tmp_path, option):
        with pytest.raises(DeviceError, match="/dev/nbd0 is attached already, by ") as caught:
            attached("/dev/nbd0", way=way)
        assert caught.value.errno == errno.EBUSY
        assert sysfs.size(0) == 4 * MIB
        assert Path("/dev/nbd0").read_bytes() == bytes(4 * MIB)
        assert attached("auto", way=way).path == "/dev/nbd1"


@pytest.mark.parametrize("holder", ["netlink", "ioctl"])
def test_a_device_of_ours_is_not_attached_again(attached: Attach, way: str, holder: str) -> None:
    first = attached(way=holder)
    with pytest.raises(DeviceError, match=r"is attached .*already") as caught:
        attached(first.path, way=way)
    assert caught.value.errno == errno.EBUSY
    first.probe()


def test_the_tag_of_another_disk_is_named(attached: Attach, way: str) -> None:
    attached("/dev/nbd0", tag="nbd-reactor:other:disk")
    message = "/dev/nbd0 is attached by nbd-reactor already, as nbd-reactor:other:disk"
    with pytest.raises(DeviceError, match=message):
        attached("/dev/nbd0", way=way)


def test_who_holds_the_node_open_is_named(attached: Attach) -> None:
    with Path("/dev/nbd0").open("rb") as node, subprocess.Popen(["sleep", "99"], stdin=node) as it:
        node.close()
        message = rf"/dev/nbd0 is not attached, but is held open by sleep \(pid {it.pid}\)"
        try:
            with pytest.raises(DeviceError, match=message) as caught:
                attached("/dev/nbd0")
        finally:
            it.kill()
    assert caught.value.errno == errno.EBUSY
    attached("/dev/nbd0").probe()


@pytest.mark.parametrize(
    "device", ["/dev/nbd", "/dev/nbd01", "/dev/nbd0p1", "/dev/sda", "nbd0", "/dev/nbd0\n", ""]
)
def test_a_name_that_is_no_nbd_device_is_refused(attached: Attach, device: str) -> None:
    with pytest.raises(DeviceError, match="is no nbd device") as caught:
        attached(device)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    "settings",
    [
        {"size": 0},
        {"size": 513},
        {"size": 1 << 63},
        {"block_size": 256},
        {"block_size": 8192},
        {"connections": 2},
    ],
    ids=str,
)
def test_what_no_kernel_takes_is_refused_before_it_is_asked(
    attached: Attach, way: str, settings: dict[str, int]
) -> None:
    with pytest.raises(DeviceError, match="cannot be attached to a disk with") as caught:
        attached("/dev/nbd0", way=way, **settings)
    assert caught.value.errno == errno.EINVAL
    assert sysfs.is_free(0)


def test_an_index_beyond_the_kernels_is_refused(attached: Attach, way: str) -> None:
    with pytest.raises(DeviceError, match=r"/dev/nbd999999 (cannot be attached|does not exist)"):
        attached("/dev/nbd999999", way=way)


def test_the_kernel_ends_are_closed_whatever_happens(server: Server, way: str) -> None:
    kernel_end = server.connect()
    with pytest.raises(DeviceError):
        attach_to(server, "/dev/null", way, kernel_end)
    assert kernel_end.fileno() == -1


def attach_to(server: Server, device: str, way: str, kernel_end: socket.socket) -> None:
    attach(
        device,
        way,  # type: ignore[arg-type]
        tag="nbd-reactor:test:memory",
        size=SIZE,
        block_size=512,
        flags=FLAGS_ALL,
        kernel_ends=[kernel_end],
        timeout=None,
        dead_timeout=60,
    )


@pytest.mark.parametrize("privileges", [["--reuid=65534"], ["--bounding-set=-sys_admin"]])
def test_without_privilege_the_message_says_what_is_needed(way: str, privileges: list[str]) -> None:
    code = f"""
import socket
from reactor.attach.device import attach
from reactor.errors import DeviceError
try:
    attach("/dev/nbd0", {way!r}, tag="t", size={SIZE}, block_size=512, flags=1,
           kernel_ends=[socket.socketpair()[0]], timeout=None, dead_timeout=60)
except DeviceError as error:
    print(error.errno, error)
"""
    output = run(
        *("setpriv", *privileges, "--inh-caps=-all", "--clear-groups"), sys.executable, "-c", code
    )
    number, _, message = output.strip().partition(" ")
    assert int(number) in (errno.EPERM, errno.EACCES)
    assert message == "/dev/nbd0 cannot be attached: this needs root (CAP_SYS_ADMIN)"


@pytest.fixture
def no_driver() -> Iterator[None]:
    """Unload the driver; only where tools/kernel says what to load again."""
    module = os.environ.get("KERNEL_NBD_MODULE")
    if not module:
        pytest.skip(f"the nbd driver of this host ({platform.release()}) stays loaded")
    nbds = Path("/sys/module/nbd/parameters/nbds_max").read_text().strip()
    run("rmmod", "nbd")
    yield
    run("insmod", module, f"nbds_max={nbds}")


@pytest.mark.usefixtures("no_driver")
def test_without_the_driver_the_message_says_how_to_load_it(attached: Attach, way: str) -> None:
    with pytest.raises(DeviceError, match="load it with: modprobe nbd") as caught:
        attached("/dev/nbd0", way=way)
    assert caught.value.errno == errno.ENODEV

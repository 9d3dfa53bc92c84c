"""Controllers that start with another config than the one whose devices the kernel still holds."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.client import Client
from tests.commands import attached, ctl, run
from tests.kernel.media import load_drivers, needs_drivers
from tests.mounting import mounted_new, swapped_to
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

MIB = 1 << 20
LENGTH = 256 << 10


def disk(backend: str, **keys: object) -> str:
    pairs = {"backend": backend, "device": "/dev/nbd0", **keys}
    return f"disks:\n  x: {{{', '.join(f'{key}: {value}' for key, value in pairs.items())}}}\n"


def end_both(running: RunningService) -> None:
    workers = running.workers().values()
    for process in (running.process, *workers):
        process.kill()
    running.process.wait()


def end_with_keep(running: RunningService) -> None:
    assert running.stop(signal.SIGUSR1) == 0


def end_the_controller(running: RunningService) -> None:
    running.process.kill()
    running.process.wait()


@pytest.mark.parametrize("end", [end_both, end_with_keep, end_the_controller])
@pytest.mark.parametrize("options", [(), ("--log-level", "debug")])  # the worker is replaced
def test_another_file_is_not_slipped_under_a_held_device(
    service: Start, tmp_path: Path, end: Callable[[RunningService], None], options: tuple[str, ...]
) -> None:
    old, new = tmp_path / "old.img", tmp_path / "new.img"
    for image in (old, new):
        with image.open("wb") as file:
            file.truncate(8 * MIB)
    running = service(disk("file", path=old))
    device = os.open("/dev/nbd0", os.O_RDWR)
    try:
        os.write(device, b"A" * LENGTH)
        os.fsync(device)
        os.pwrite(device, b"B" * LENGTH, LENGTH)  # in the page cache, and no farther
        end(running)
        again = service(
            disk("file", path=new), *options, runtime_dir=running.runtime_dir, await_ready=False
        )
        again.await_line("disk x is stopped, and made anew as the config says now")
    finally:
        os.close(device)
    again.await_line("ready: 1 of 1 disks")
    assert again.await_state("x", "online")["device"] == "/dev/nbd0"
    assert again.stop() == 0
    assert old.read_bytes()[: 2 * LENGTH] == b"A" * LENGTH + b"B" * LENGTH
    assert not any(new.read_bytes())


def test_a_device_of_another_file_is_not_taken_over_when_the_state_is_lost(
    service: Start, tmp_path: Path
) -> None:
    old, new = tmp_path / "old.img", tmp_path / "new.img"
    old.write_bytes(b"A" * 8 * MIB)
    new.write_bytes(b"B" * 8 * MIB)
    running = service(disk("file", path=old))
    device = os.open("/dev/nbd0", os.O_RDWR)
    try:
        end_with_keep(running)
        (running.runtime_dir / "state.json").unlink()
        again = service(disk("file", path=new), runtime_dir=running.runtime_dir, await_ready=False)
        again.await_line("/dev/nbd0 is detached: it is no device of disk x any more")
        with pytest.raises(OSError, match="Input/output error"):
            os.read(device, LENGTH)
    finally:
        os.close(device)
    again.await_line("ready: 1 of 1 disks")
    again.rpc("reactor_start_disk", name="x")
    again.await_state("x", "online")
    with Path("/dev/nbd0").open("rb") as device_file:
        assert device_file.read(LENGTH) == b"B" * LENGTH
    assert set(old.read_bytes()) == {ord("A")}


def test_memory_whose_disk_has_another_backend_is_removed(service: Start) -> None:
    running = service(disk("malloc", size="8MiB"))
    instance = (running.runtime_dir / "instance").read_text().strip()
    (memory,) = Path("/dev/shm").glob(f"nbd-reactor-{instance}-*")
    end_both(running)
    again = service(disk("null", size="8MiB"), runtime_dir=running.runtime_dir)
    again.await_state("x", "online")
    assert not memory.exists()


def test_other_timeouts_reach_the_kernel(service: Start) -> None:
    timeout = Path("/sys/block/nbd0/queue/io_timeout")
    running = service(disk("malloc", size="8MiB", timeout=20))
    assert timeout.read_text() == "20000\n"
    end_both(running)
    again = service(disk("malloc", size="8MiB", timeout=30), runtime_dir=running.runtime_dir)
    again.await_state("x", "online")
    assert timeout.read_text() == "30000\n"


@contextmanager
def mounted_by_another_name(device: str, at: Path) -> Iterator[Path]:
    """As by mount(2): what is in /proc/mounts then is a link."""
    at.mkdir(exist_ok=True)
    run("mkfs.ext4", "-q", device)
    link = at.with_name("link")
    link.symlink_to(device)
    run("busybox", "mount", "-t", "ext4", str(link), str(at))
    try:
        yield at
    finally:
        run("umount", str(at))
        link.unlink()


@contextmanager
def mounted_through_a_loop_device(device: str, at: Path) -> Iterator[Path]:
    load_drivers(at.parent, "loop")
    loop = run("losetup", "--find", "--show", device).strip()
    try:
        with mounted_new(loop, at):
            yield at
    finally:
        run("losetup", "--detach", loop)


Use = Callable[[str, Path], AbstractContextManager[object]]


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (mounted_new, "the mount {}"),
        (mounted_by_another_name, "somebody"),
        (lambda device, _at: swapped_to(device), "the swap"),
        pytest.param(mounted_through_a_loop_device, "/dev/loop", marks=needs_drivers),
    ],
)
def test_a_device_in_use_is_not_taken_from_its_users(
    service: Start, tmp_path: Path, use: Use, what: str
) -> None:
    at = tmp_path / "mount"
    keys = {"path": tmp_path / "image", "size": "16MiB"}
    running = service(disk("file", **keys))
    with use("/dev/nbd0", at):
        running.config_path.write_text(disk("file", **keys, dead_timeout=60))
        answer = running.rpc_raw("reactor_reload")["error"]["message"]
        assert f"disk x stays as it was: /dev/nbd0 is in use by {what.format(at)}" in answer
        assert "another dead_timeout" in answer
        assert answer in ctl(running.runtime_dir, "show", "x")
        running.config_path.write_text(disk("file", **{**keys, "device": "auto", "size": "32MiB"}))
        running.rpc("reactor_reload")
        running.await_true(lambda: Path("/sys/block/nbd0/size").read_text() == "65536\n")
        running.config_path.write_text(disk("file", **{**keys, "device": "/dev/nbd1"}))
        assert "another device" in running.rpc_raw("reactor_reload")["error"]["message"]
        for action in (end_with_keep, end_both):
            action(running)
            running = service(disk("file", **keys, readonly=True), runtime_dir=running.runtime_dir)
            assert "another readonly" in running.await_line("disk x stays as it was")
            (at / "file").write_bytes(b"m" * LENGTH) if at.exists() else None
        os.sync()
    running.rpc("reactor_reload")
    running.await_true(lambda: running.rpc("reactor_get_disks", name="x")[0]["readonly"])
    running.await_state("x", "online")


def two_disks(x: str, y: str, more: str = "") -> str:
    """Return a config of two memory disks on these devices."""
    keys = f"backend: malloc, size: 16MiB{more}"
    return f"disks:\n  x: {{{keys}, device: {x}}}\n  y: {{{keys}, device: {y}}}\n"


def await_devices(running: RunningService, **devices: str) -> None:
    def found() -> dict[str, str]:
        disks = running.rpc("reactor_get_disks")
        return {disk["name"]: disk["device"] for disk in disks if disk["state"] == "online"}

    running.await_true(lambda: found() == devices)


def test_a_device_that_stays_is_kept_from_others(service: Start, tmp_path: Path) -> None:
    """Two disks cannot exchange their devices while one is mounted; both stay as they were."""
    running = service(two_disks("/dev/nbd0", "/dev/nbd1"))
    exchanged = two_disks("/dev/nbd1", "/dev/nbd0")
    with mounted_new("/dev/nbd0", tmp_path / "mount"), Path("/dev/nbd1").open("rb") as other:
        running.config_path.write_text(exchanged)
        answer = running.rpc_raw("reactor_reload")["error"]["message"]
        assert "disk x stays as it was: /dev/nbd0 is in use" in answer
        assert "disk y stays as it was: disk x keeps /dev/nbd0" in answer
        assert other.read(4096) == bytes(4096)
    running.rpc("reactor_reload")
    await_devices(running, x="/dev/nbd1", y="/dev/nbd0")


def test_storage_that_stays_is_kept_from_others(service: Start, tmp_path: Path) -> None:
    def images(x: str, y: str) -> str:
        lines = (
            f"  {name}: {{backend: file, path: {tmp_path}/{image}, size: 16MiB, device: {on}}}\n"
            for name, image, on in (("x", x, "/dev/nbd0"), ("y", y, "/dev/nbd1"))
        )
        return f"disks:\n{''.join(lines)}"

    running = service(images("a", "b"))
    with mounted_new("/dev/nbd0", tmp_path / "mount"), Path("/dev/nbd1").open("rb") as other:
        running.config_path.write_text(images("b", "a"))
        answer = running.rpc_raw("reactor_reload")["error"]["message"]
        assert f"disk y stays as it was: disk x keeps {tmp_path}/a" in answer
        assert other.read(4096) == bytes(4096)
    running.rpc("reactor_reload")
    await_devices(running, x="/dev/nbd0", y="/dev/nbd1")
    assert f"{tmp_path}/b" in running.rpc("reactor_get_disks", name="x")[0]["config"]


def test_a_second_reload_keeps_to_the_devices_of_the_first(service: Start) -> None:
    running = service(two_disks("/dev/nbd0", "/dev/nbd1"))
    running.config_path.write_text(two_disks("/dev/nbd2", "/dev/nbd3", ", dead_timeout: 60"))
    for _ in range(2):
        running.rpc("reactor_reload")
    await_devices(running, x="/dev/nbd2", y="/dev/nbd3")


def test_the_first_free_device_is_none_that_another_names(service: Start) -> None:
    running = service(two_disks("/dev/nbd4", "/dev/nbd5"))
    worker = running.workers()[0]
    worker.suspend()  # what y has to do takes long
    running.config_path.write_text(two_disks("auto", "/dev/nbd0", ", dead_timeout: 60"))
    running.rpc("reactor_reload")
    worker.resume()
    await_devices(running, x="/dev/nbd1", y="/dev/nbd0")


def test_a_disk_that_is_taken_out_stays_while_it_is_mounted(service: Start, tmp_path: Path) -> None:
    running = service(disk("malloc", size="16MiB"))
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount:
        running.config_path.write_text("disks: {}\n")
        answer = running.rpc_raw("reactor_reload")["error"]["message"]
        assert "disk x stays as it was: /dev/nbd0 is in use by the mount" in answer
        assert "the config has the disk no more" in answer
        end_both(running)
        again = service("disks: {}\n", runtime_dir=running.runtime_dir)
        assert "no more" in again.await_state("x", "online")["reason"]
        (mount / "file").write_bytes(b"m" * LENGTH)
        os.sync()
    again.rpc("reactor_reload")
    again.await_true(lambda: again.rpc("reactor_get_disks") == [])
    assert not attached("/dev/nbd0")


def test_a_size_on_its_way_brings_no_device_back(service: Start) -> None:
    running = service(disk("malloc", size="8MiB"))
    running.workers()[0].kill()
    running.await_line("was ended by signal 9")
    running.config_path.write_text(disk("malloc", size="16MiB"))
    running.rpc("reactor_reload")  # the size has to wait for the next worker
    running.rpc("nbd_stop_disk", nbd_device="/dev/nbd0")
    running.await_true(lambda: running.rpc("reactor_get_disks", name="x")[0]["size"] == 16 * MIB)
    running.await_state("x", "online")
    assert not attached("/dev/nbd0")


def test_other_addresses_leave_a_device_alone(service: Start, tmp_path: Path) -> None:
    running = service(disk("malloc", size="8MiB", listen=f"unix:{tmp_path}/old.sock"))
    old_path, new_path = tmp_path / "old.sock", tmp_path / "new.sock"
    with Path("/dev/nbd0").open("r+b", buffering=0) as device, Client(old_path, "x") as old:
        device.write(b"d" * 4096)
        os.fsync(device)
        running.config_path.write_text(disk("malloc", size="8MiB", listen=f"unix:{new_path}"))
        running.rpc("reactor_reload")
        running.await_true(new_path.exists)
        running.await_state("x", "online")
        with Client(new_path, "x") as new:
            assert new.read(0, 4096) == b"d" * 4096
        assert old.read(0, 4096) == b"d" * 4096, "who is there stays"
        assert not old_path.exists()
        device.write(b"e" * 4096)
        os.fsync(device)
    assert "has a new socket" not in running.log


def test_a_refusal_makes_no_disk_the_config_s(service: Start, tmp_path: Path) -> None:
    """One that was made at run time is refused what a config says of it, and stays without one."""
    running = service("disks: {}\n")
    ctl(running.runtime_dir, "start", "x", "backend=malloc", "size=16MiB", "device=/dev/nbd0")
    with mounted_new("/dev/nbd0", tmp_path / "mount"):
        running.config_path.write_text(disk("malloc", size="16MiB", readonly=True))
        assert "stays as it was" in running.rpc_raw("reactor_reload")["error"]["message"]
        running.config_path.write_text("disks: {}\n")
        running.rpc("reactor_reload")
        assert running.rpc("reactor_get_disks", name="x")[0]["state"] == "online"
        (tmp_path / "mount/file").write_bytes(b"m" * LENGTH)
        os.sync()

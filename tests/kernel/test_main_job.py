"""The main job on a real kernel: disks.yaml to /dev/nbdN, used as a user would."""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.commands import attached, fio_verify, fio_verify_command, run
from tests.mounting import mounted, mounted_new
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

MIB = 1 << 20


def two_disks(attach: str, image: Path) -> str:
    return f"""
disks:
  ram0: {{backend: malloc, size: 64MiB, device: /dev/nbd0, attach: {attach}}}
  vm1: {{backend: file, path: {image}, size: 64MiB, device: /dev/nbd1, attach: {attach}}}
"""


@pytest.fixture(params=["netlink", "ioctl"])
def attach(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_fio_verifies_both_disks_and_stopping_leaves_nothing(
    service: Start, tmp_path: Path, attach: str
) -> None:
    config = two_disks(attach, tmp_path / "vm1.img")
    running = service(config)
    for device in ("/dev/nbd0", "/dev/nbd1"):
        fio_verify(device)
    assert running.stop() == 0
    assert not attached("/dev/nbd0")
    assert not attached("/dev/nbd1")
    again = service(config, runtime_dir=running.runtime_dir)
    assert attached("/dev/nbd0")
    assert again.stop() == 0


@pytest.mark.parametrize("disk", ["/dev/nbd0", "/dev/nbd1"])
def test_a_file_system_keeps_a_tree(service: Start, tmp_path: Path, attach: str, disk: str) -> None:
    service(two_disks(attach, tmp_path / "vm1.img"))
    tree = Path(__file__).parent.parent.parent / "reactor"
    mount = tmp_path / "mount"
    with mounted_new(disk, mount):
        shutil.copytree(tree, mount / "tree", ignore=shutil.ignore_patterns("__pycache__"))
        os.sync()
    run("fsck.ext4", "-fn", disk)
    with mounted(disk, mount, "-o", "ro"):
        different = filecmp.dircmp(tree, mount / "tree", ignore=["__pycache__"])
        assert not different.left_only
        assert not different.diff_files
        assert different.common


def test_blkdiscard_frees_space_in_the_backing_file(
    service: Start, tmp_path: Path, attach: str
) -> None:
    image = tmp_path / "vm1.img"
    service(two_disks(attach, image))
    run("dd", "if=/dev/urandom", "of=/dev/nbd1", "bs=1M", "count=16", "oflag=direct")
    before = image.stat().st_blocks
    assert before * 512 >= 16 * MIB
    run("blkdiscard", "/dev/nbd1")
    assert image.stat().st_blocks < before // 4


def test_fsync_is_a_flush_and_dsync_writes_carry_fua(
    service: Start, tmp_path: Path, attach: str
) -> None:
    running = service(two_disks(attach, tmp_path / "vm1.img"))
    queue = Path("/sys/block/nbd1/queue")
    assert (queue / "write_cache").read_text().strip() == "write back"
    assert (queue / "fua").read_text().strip() == "1"
    run("dd", "if=/dev/zero", "of=/dev/nbd1", "bs=4k", "count=8", "oflag=direct,dsync")
    run("dd", "if=/dev/zero", "of=/dev/nbd1", "bs=4k", "count=8", "conv=fsync")

    def flushes() -> int:
        count: int = running.rpc("reactor_get_disks", name="vm1")[0]["statistics"].get("flushes", 0)
        return count

    running.await_true(lambda: flushes() >= 1)


def test_a_killed_worker_is_not_noticed_by_fio(service: Start, tmp_path: Path) -> None:
    running = service(two_disks("netlink", tmp_path / "vm1.img"))
    fio = [
        subprocess.Popen(
            fio_verify_command(device, "24M", loops="2"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for device in ("/dev/nbd0", "/dev/nbd1")
    ]
    for _ in range(3):
        old = running.workers()[0]
        running.await_true(
            lambda: running.rpc("reactor_get_disks", name="ram0")[0]["state"] == "online"
        )
        old.kill()
        running.await_true(lambda old=old: running.workers().get(0, old) != old)
        for name in ("ram0", "vm1"):
            running.await_state(name, "online")
    for process in fio:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()


def test_a_killed_controller_leaves_devices_that_the_next_one_takes_over(
    service: Start, tmp_path: Path
) -> None:
    config = two_disks("netlink", tmp_path / "vm1.img")
    running = service(config)
    run("dd", "if=/dev/urandom", f"of={tmp_path / 'data'}", "bs=1M", "count=4")
    run("dd", f"if={tmp_path / 'data'}", "of=/dev/nbd0", "bs=1M", "oflag=direct")
    running.process.kill()
    running.process.wait()
    # The worker serves on without its controller.
    run("cmp", "-n", str(4 * MIB), str(tmp_path / "data"), "/dev/nbd0")
    again = service(config, runtime_dir=running.runtime_dir)
    run("sysctl", "-q", "vm.drop_caches=3")
    run("cmp", "-n", str(4 * MIB), str(tmp_path / "data"), "/dev/nbd0")
    fio_verify("/dev/nbd1", "4M")
    assert again.stop() == 0


def test_on_exit_keep_holds_io_until_the_next_start(service: Start, tmp_path: Path) -> None:
    config = two_disks("netlink", tmp_path / "vm1.img")
    running = service(config, "--on-exit", "keep")
    fio = [
        subprocess.Popen(
            fio_verify_command(device, "24M", loops="2"),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for device in ("/dev/nbd0", "/dev/nbd1")
    ]
    for _ in range(2):
        running.await_state("vm1", "online")
        running.process.terminate()
        assert running.process.wait(60) == 0
        assert attached("/dev/nbd0")
        assert attached("/dev/nbd1")
        running = service(config, "--on-exit", "keep", runtime_dir=running.runtime_dir)
    for process in fio:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output.decode()
    running.process.terminate()
    assert running.process.wait(60) == 0
    # A config that asks for no devices gives them back.
    last = service("disks: {ram0: {backend: malloc, size: 64MiB}}", runtime_dir=running.runtime_dir)
    running.await_true(lambda: not attached("/dev/nbd0") and not attached("/dev/nbd1"))
    last.stop()


def test_a_device_of_another_program_is_refused_and_untouched(
    service: Start, tmp_path: Path
) -> None:
    export = tmp_path / "export.sock"
    server = service(f"disks: {{theirs: {{backend: malloc, size: 8MiB, listen: 'unix:{export}'}}}}")
    run("nbd-client", "-unix", str(export), "-N", "theirs", "/dev/nbd0")
    try:
        other = service("disks: {ours: {backend: malloc, size: 8MiB, device: /dev/nbd0}}")
        line = other.await_line("disk ours failed:")
        assert "/dev/nbd0" in line
        assert "attached already" in line
        other.stop()
        assert attached("/dev/nbd0"), "the other program's device was taken away"
        run("dd", "if=/dev/nbd0", "of=/dev/null", "bs=4k", "count=1", "iflag=direct")
    finally:
        run("nbd-client", "-d", "/dev/nbd0")
    server.stop()


def test_a_disk_on_auto_gets_the_first_free_device(service: Start) -> None:
    running = service("disks: {any: {backend: malloc, size: 8MiB, device: auto}}")
    device = running.rpc("reactor_get_disks", name="any")[0]["device"]
    assert device.startswith("/dev/nbd")
    assert attached(device)
    fio_verify(device, "4M")


def test_a_device_disconnected_from_outside_fails_its_disk_alone(
    service: Start, tmp_path: Path
) -> None:
    running = service(two_disks("netlink", tmp_path / "vm1.img"))
    run("nbd-client", "-d", "/dev/nbd0")
    assert "/dev/nbd0" in running.await_state("ram0", "failed")["reason"]
    fio_verify("/dev/nbd1", "4M")


def test_resize_reaches_the_kernel(service: Start, tmp_path: Path, attach: str) -> None:
    running = service(two_disks(attach, tmp_path / "vm1.img"))
    for name, device in (("ram0", "/dev/nbd0"), ("vm1", "/dev/nbd1")):
        for size in (96 * MIB, 32 * MIB):
            running.rpc("reactor_resize_disk", name=name, size=size)
            assert run("blockdev", "--getsize64", device).strip() == str(size)
        fio_verify(device, "4M", offset="20M")


def test_a_reload_grows_a_mounted_disk_while_its_worker_restarts(
    service: Start, tmp_path: Path
) -> None:
    running = service(two_disks("netlink", tmp_path / "vm1.img"))
    config = running.config_path.read_text()
    running.config_path.write_text(config.replace("64MiB", "96MiB"))
    with mounted_new("/dev/nbd0", tmp_path / "mnt") as mount:
        for worker in running.workers().values():
            worker.kill()
        running.await_line("was ended by signal 9")
        running.rpc("reactor_reload")
        running.await_true(lambda: Path("/sys/block/nbd0/size").read_text() == f"{96 << 11}\n")
        with (mount / "file").open("wb") as file:
            file.write(bytes(MIB))
            os.fsync(file.fileno())

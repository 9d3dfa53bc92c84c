"""The storage below a disk is full: writes fail and recover, all else goes on, nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.client import Client
from tests.commands import fio_verify, run
from tests.kernel.media import MIB, load_drivers, needs_drivers
from tests.mounting import mounted
from tests.running import RunningService

pytestmark = [pytest.mark.kernel, needs_drivers]
Start = Callable[..., RunningService]

ROOM = 16  # MiB that the storage has for a disk of 64


@dataclass(frozen=True)
class Storage:
    """Where a disk stands, and how its room is taken."""

    disk: str
    filler: Path

    def fill(self) -> None:
        room = os.statvfs(self.filler.parent)
        with self.filler.open("wb") as filler:
            os.posix_fallocate(filler.fileno(), 0, room.f_bavail * room.f_frsize - ROOM * MIB)


@contextmanager
def in_memory(folder: Path) -> Iterator[Storage]:
    yield Storage("backend: malloc, size: 64MiB", Path("/dev/shm/filler"))
    Path("/dev/shm/filler").unlink(missing_ok=True)


@contextmanager
def on_tmpfs(folder: Path) -> Iterator[Storage]:
    with mounted("none", folder / "small", "-t", "tmpfs", "-o", "size=100m") as mount:
        yield Storage(f"backend: file, path: {mount}/image, size: 64MiB", mount / "filler")


@contextmanager
def on_ext4(folder: Path, *, direct: bool = False) -> Iterator[Storage]:
    load_drivers(folder, "loop")
    mount = folder / "small"
    with (folder / "device").open("wb") as device:
        device.truncate(128 * MIB)
    run("mkfs.ext4", "-q", "-m", "0", str(folder / "device"))
    options = f"path: {mount}/image, size: 64MiB, direct: {str(direct).lower()}"
    with mounted(folder / "device", mount, "-o", "loop"):
        yield Storage(f"backend: file, {options}", mount / "filler")


@contextmanager
def on_ext4_direct(folder: Path) -> Iterator[Storage]:
    with on_ext4(folder, direct=True) as storage:
        yield storage


@contextmanager
def endless_reads(device: str) -> Iterator[None]:
    """Read the first 4 MiB over and over with fio; none may fail."""
    options = ("--name=reads", "--rw=randread", "--direct=1", "--size=4M", "--thinktime=5ms")
    command = ["fio", *options, "--time_based=1", "--runtime=600", f"--filename={device}"]
    quiet = subprocess.DEVNULL
    fio = subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield
        assert fio.poll() is None, fio.communicate()[0].decode()
    finally:
        fio.terminate()
        fio.communicate()


@pytest.mark.parametrize("storage", [in_memory, on_tmpfs, on_ext4, on_ext4_direct])
def test_full_storage(service: Start, tmp_path: Path, storage: Callable[..., Storage]) -> None:
    with storage(tmp_path) as full:
        running = service(f"""
disks:
  full: {{{full.disk}, device: /dev/nbd0, listen: 'unix:{tmp_path}/full'}}
  other: {{backend: malloc, size: 8MiB, device: /dev/nbd1}}
""")
        workers = running.workers()
        data = os.urandom(8 * MIB)
        (tmp_path / "data").write_bytes(data)
        run("dd", f"if={tmp_path}/data", "of=/dev/nbd0", "bs=1M", "conv=fsync", "oflag=direct")
        fio_verify("/dev/nbd1", "2M")  # so that it has its memory, where that is what gets full
        full.fill()
        with endless_reads("/dev/nbd0"), Client(tmp_path / "full", "full") as client:
            dd = ("dd", "if=/dev/zero", "of=/dev/nbd0", "bs=1M", "seek=8", "count=40")
            assert "Input/output error" in run(*dd, "oflag=direct", check=False)
            for fua in (False, True):
                with pytest.raises(OSError, match="No space left on device") as raised:
                    client.write(56 * MIB, b"x" * MIB, fua=fua)
                assert raised.value.errno == errno.ENOSPC
            client.flush()
            assert client.read(0, 8 * MIB) == data, "what was written before is lost"
            client.write(0, b"y" * 4096)  # here is room already
            assert client.read(0, 4096) == b"y" * 4096
            assert client.read(56 * MIB, MIB) == bytes(MIB)
            fio_verify("/dev/nbd1", "2M")
            full.filler.unlink()
            client.write(56 * MIB, b"x" * MIB, fua=True)
        fio_verify("/dev/nbd0", "16M", offset="16M")
        assert running.workers() == workers
        assert running.await_state("full", "online")["reason"] == ""
        assert "disk full: write of 1048576 bytes" in running.log
        assert "Traceback" not in running.log
        assert running.stop() == 0

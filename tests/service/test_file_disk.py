"""Disks on files in the whole service: who else uses the file, and what happens without it."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil

from tests.commands import ctl, nbdsh
from tests.running import RunningService

Start = Callable[..., RunningService]


def config(tmp_path: Path) -> str:
    return (
        "disks:\n  a: {backend: file, size: 1MiB, direct: true, "
        f"path: {tmp_path}/image, listen: 'unix:{tmp_path}/a.sock'}}\n"
    )


def replaced(running: RunningService, worker: psutil.Process) -> bool:
    return running.workers().get(0, worker) != worker


def test_a_disk_starts_once_the_last_user_lets_its_file_go(service: Start, tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        running = service(config(tmp_path), await_ready=False)
        running.await_line(f"disk a waits: {tmp_path}/image: is in use by another disk or service")
    assert running.await_line("ready:") == "ready: 1 of 1 disks on 1 workers"


def test_a_disk_whose_file_stays_in_use_fails(service: Start, tmp_path: Path) -> None:
    with (tmp_path / "image").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        running = service(config(tmp_path))
        line = running.await_line("disk a failed:")
        assert line.endswith(f"{tmp_path}/image: is in use by another disk or service")


def test_a_killed_worker_comes_back_with_its_file(service: Start, tmp_path: Path) -> None:
    running = service(config(tmp_path))
    uri = f"nbd+unix:///?socket={tmp_path}/a.sock"
    nbdsh(uri, "h.pwrite(b'x' * 4096, 8192, nbd.CMD_FLAG_FUA)")
    for _ in range(3):
        worker = running.workers()[0]
        # Plenty is in flight when it dies; the kernel ends that after the process.
        script = "[h.aio_pwrite(nbd.Buffer(4096), 65536 + 4096 * n) for n in range(200)]"
        nbdsh(uri, f"{script}; import os; os.kill({worker.pid}, 9)")
        running.await_true(partial(replaced, running, worker))
        running.await_state("a", "online")
    nbdsh(uri, "assert h.pread(4096, 8192) == b'x' * 4096")


def test_a_deleted_file_removes_its_disk_and_no_other(service: Start, tmp_path: Path) -> None:
    text = config(tmp_path)
    text += f"  b: {{backend: null, size: 1MiB, listen: 'unix:{tmp_path}/b.sock'}}\n"
    running = service(text)
    (tmp_path / "image").unlink()
    running.await_state("a", "removed")
    assert running.await_line("is removed:").endswith(f"{tmp_path}/image was deleted")
    nbdsh(f"nbd+unix:///?socket={tmp_path}/b.sock", "h.pread(4096, 0)")


def test_the_umask_lets_others_at_the_sockets_of_disks_alone(
    service: Start, tmp_path: Path
) -> None:
    umask = os.umask(0o007)
    try:
        running = service(config(tmp_path))
    finally:
        os.umask(umask)
    made = [tmp_path / "image", tmp_path / "a.sock", *running.runtime_dir.iterdir()]
    assert running.rpc_socket in made
    opened = [path for path in made if stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert opened == [tmp_path / "a.sock"]


def test_a_failed_disk_that_is_stopped_is_stopped(service: Start, tmp_path: Path) -> None:
    running = service(f"disks:\n  file: {{backend: file, path: {tmp_path}/image}}\n")
    running.await_state("file", "failed")
    ctl(running.runtime_dir, "stop", "file")
    assert running.await_state("file", "stopped")["reason"] == ""

"""A controller dies, or is another one now; its workers live, and serve on."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.client import Client
from tests.running import RunningService
from tests.service.memory_disks import nbdsh, ram

Start = Callable[..., RunningService]
DEEP = b"[" * 100_000
NESTED = hashlib.sha256(DEEP).hexdigest().encode() + b"\n" + DEEP
UUID = "6c55a2ac-b0a4-4d3e-bdf5-9d9c2f1a8a51"


def crash(running: RunningService) -> dict[int, psutil.Process]:
    """Kill the controller; returns its workers."""
    workers = running.workers()
    running.process.kill()
    running.process.wait()
    return workers


def lives(process: psutil.Process) -> bool:
    """Whether it runs; it is nobody's child here, so that it may stay a zombie."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def again(service: Start, before: RunningService, *arguments: str, **settings) -> RunningService:
    """Start the next controller, with the same config unless another one is given."""
    config = settings.pop("config", None)
    if config is None and before.config_path.exists():
        config = before.config_path.read_text()
    return service(config, *arguments, runtime_dir=before.runtime_dir, **settings)


def pids(workers: dict[int, psutil.Process]) -> dict[int, int]:
    return {core: worker.pid for core, worker in workers.items()}


def test_clients_do_not_notice_that_a_controller_is_replaced(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a", "b"), cores="0,1")
    with Client(tmp_path / "a.sock", "a") as client:
        client.write(0, b"1" * 4096)
        workers = crash(running)
        client.write(4096, b"2" * 4096)
        after = again(service, running, cores="0,1")
        client.write(8192, b"3" * 4096)
        assert client.read(0, 12288) == b"1" * 4096 + b"2" * 4096 + b"3" * 4096
        assert pids(after.workers()) == pids(workers)
        (a, b) = after.rpc("reactor_get_disks")
        assert (a["state"], b["state"]) == ("online", "online")
        after.await_true(
            lambda: after.rpc("reactor_get_disks", name="a")[0]["statistics"].get("writes") == 3
        )
    assert after.rpc("reactor_get_workers")[0]["restarts"] == 0


def test_an_adopted_worker_is_replaced_when_it_dies(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'k' * 4096, 0)")
    (worker,) = crash(running).values()
    after = again(service, running)
    worker.kill()
    after.await_line("has ended")
    after.await_true(lambda: after.workers().keys() == {0})
    after.await_state("a", "online")
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'k' * 4096")


def test_what_was_done_at_run_time_outlives_the_controller(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "kept", "stopped", "removed"))
    running.rpc("bdev_malloc_create", name="made", num_blocks=2048, block_size=512, uuid=UUID)
    running.rpc("reactor_resize_disk", name="kept", size=16 << 20)
    running.rpc("reactor_stop_disk", name="stopped")
    running.rpc("reactor_remove_disk", name="removed")
    crash(running)
    after = again(service, running)
    disks = {disk["name"]: disk for disk in after.rpc("reactor_get_disks")}
    assert {name: disk["state"] for name, disk in disks.items()} == {
        "kept": "online",
        "stopped": "stopped",
        "made": "online",
    }
    assert disks["kept"]["size"] == 16 << 20
    assert after.rpc("bdev_get_bdevs", name=UUID)[0]["name"] == "made"
    after.rpc("reactor_start_disk", name="stopped")


def test_all_comes_back_when_the_workers_died_too(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    running.rpc("bdev_malloc_create", name="made", num_blocks=2048, block_size=512)
    running.rpc("reactor_resize_disk", name="a", size=16 << 20)
    nbdsh(tmp_path, "a", "h.pwrite(b'e' * 4096, (16 << 20) - 4096)")
    for worker in crash(running).values():
        worker.kill()
    after = again(service, running)
    assert {disk["name"] for disk in after.rpc("reactor_get_disks")} == {"a", "made"}
    nbdsh(tmp_path, "a", "assert h.pread(4096, (16 << 20) - 4096) == b'e' * 4096")


def test_a_restart_that_keeps_brings_back_what_was_made(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"), "--on-exit", "keep")
    nbdsh(tmp_path, "a", "h.pwrite(b'k' * 4096, 0)")
    running.rpc("bdev_malloc_create", name="made", num_blocks=2048, block_size=512)
    running.process.terminate()
    assert running.process.wait(60) == 0
    after = again(service, running)
    assert {disk["name"] for disk in after.rpc("reactor_get_disks")} == {"a", "made"}
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'k' * 4096")


def test_a_stop_that_disconnects_leaves_nothing(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    running.rpc("bdev_malloc_create", name="made", num_blocks=2048, block_size=512)
    assert running.stop() == 0
    assert {path.name for path in running.runtime_dir.iterdir()} == {"instance", "lock"}
    after = again(service, running)
    assert [disk["name"] for disk in after.rpc("reactor_get_disks")] == ["a"]


def test_a_changed_config_is_taken_by_the_next_controller(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a", "dropped"))
    crash(running)
    after = again(service, running, config=ram(tmp_path, "a", "new", more=", readonly: true"))
    after.await_true(
        lambda: (
            {
                disk["name"]: (disk["state"], disk["readonly"])
                for disk in after.rpc("reactor_get_disks")
            }
            == {"a": ("online", True), "new": ("online", True)}
        )
    )


def test_workers_of_other_cores_end_and_their_disks_move(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a", "b"), cores="0,1")
    nbdsh(tmp_path, "b", "h.pwrite(b'm' * 4096, 0)")
    workers = crash(running)
    after = again(service, running, cores="0")
    assert after.workers().keys() == {0}
    assert not lives(workers[1])
    assert lives(workers[0])
    nbdsh(tmp_path, "b", "assert h.pread(4096, 0) == b'm' * 4096")


def test_workers_that_were_started_in_another_way_are_replaced(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a", "b"), cores="0,1")
    nbdsh(tmp_path, "a", "h.pwrite(b'o' * 4096, 0)")
    workers = crash(running)
    after = again(service, running, "--mode", "interrupt", cores="0,1")
    assert not pids(after.workers()).items() & pids(workers).items()
    assert "replaced" in after.log
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'o' * 4096")


def test_a_stopped_worker_of_a_dead_controller_is_replaced(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b's' * 4096, 0)")
    (worker,) = crash(running).values()
    worker.suspend()
    again(service, running)
    assert not lives(worker)
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b's' * 4096")


def test_a_worker_without_controller_ends_on_sigterm_and_one_with_does_not(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a"))
    (worker,) = running.workers().values()
    worker.terminate()
    nbdsh(tmp_path, "a", "h.pread(4096, 0)")
    crash(running)
    worker.terminate()
    running.await_true(lambda: not lives(worker), 10)
    again(service, running)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "torn"),
        (b"\xff" * 10_000, "torn"),
        (NESTED, "recursion"),
        (None, "it is not a regular file"),
    ],
    ids=["empty", "torn", "nested", "folder"],
)
def test_a_damaged_state_is_refused_and_nothing_is_touched(
    service: Start, tmp_path: Path, content: bytes | None, problem: str
) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'd' * 4096, 0)")
    (worker,) = crash(running).values()
    state = running.runtime_dir / "state.json"
    good = state.read_bytes()
    state.unlink()
    if content is None:
        state.mkdir()
    else:
        state.write_bytes(content)
    refused = again(service, running, await_ready=False)
    assert refused.process.wait(60) == 1
    assert f"saved state {state}: " in refused.log
    assert problem in refused.log
    assert refused.log.count(str(state)) == 1
    assert "Traceback" not in refused.log
    assert lives(worker)
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'd' * 4096")
    if content is None:
        state.rmdir()
    state.write_bytes(good)
    again(service, running)
    assert lives(worker)


def test_a_state_that_cannot_be_saved_stops_nothing(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    state, outdated = (running.runtime_dir / f"state{what}.json" for what in ("", "-outdated"))
    (running.runtime_dir / "state.json.new").mkdir()
    keys = {"backend": "malloc", "size": "1MiB"}
    answer = running.rpc_raw("reactor_start_disk", name="made", keys=keys)
    assert "nothing was done, as it could not be saved" in answer["error"]["message"]
    answer = running.rpc_raw("bdev_malloc_create", name="spdk", num_blocks=2048, block_size=512)
    assert answer["error"]["code"] == -errno.EISDIR
    assert [disk["name"] for disk in running.rpc("reactor_get_disks")] == ["a"]
    running.await_line("a controller that starts now would not know all")
    assert state.exists()  # nothing was done: it is all that runs
    answer = running.rpc_raw("reactor_resize_disk", name="a", size=8 << 20)
    assert "it is done, but cannot be saved for a restart" in answer["error"]["message"]
    answer = running.rpc_raw("bdev_malloc_delete", name="a")
    assert "it is done, but cannot be saved for a restart" in answer["error"]["message"]
    assert outdated.exists()  # it is not taken for all that ran
    assert not state.exists()
    (running.runtime_dir / "state.json.new").rmdir()
    running.await_true(state.exists)
    running.rpc("reactor_start_disk", name="made", keys=keys)
    assert b'"made"' in state.read_bytes()
    running.await_true(lambda: not outdated.exists())


def test_a_controller_that_was_stopped_for_long_blames_no_worker(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a"))
    workers = running.workers()
    os.kill(running.process.pid, signal.SIGSTOP)
    try:
        nbdsh(tmp_path, "a", "import time; time.sleep(13); h.pread(4096, 0)")
    finally:
        os.kill(running.process.pid, signal.SIGCONT)
    assert pids(running.workers()) == pids(workers)
    assert "silent" not in running.log


def test_the_worker_of_an_older_program_is_replaced(service: Start, tmp_path: Path) -> None:
    """As after an upgrade: it is asked nothing, whatever messages it knows."""
    running = service(ram(tmp_path, "a"))
    (worker,) = crash(running).values()
    lock = running.runtime_dir / "worker-0.lock"
    lock.write_text(f"{worker.pid}\n")
    after = again(service, running)
    assert not lives(worker)
    assert after.workers().keys() == {0}


def test_a_strict_start_that_fails_leaves_what_it_found(service: Start, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    config = ram(tmp_path, "a", "stopped") + f"  f: {{backend: file, path: {image}}}\n"
    running = service(config)
    nbdsh(tmp_path, "a", "h.pwrite(b's' * 4096, 0)")
    running.rpc("reactor_stop_disk", name="stopped")
    for worker in crash(running).values():
        worker.kill()
    image.rename(tmp_path / "away")
    strict = again(service, running, "--strict", await_ready=False)
    assert strict.process.wait(60) == 1
    assert "not started: f (--strict)" in strict.log
    (tmp_path / "away").rename(image)
    again(service, running, "--strict")
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b's' * 4096")


def test_a_disk_that_cannot_be_made_removes_nothing(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'l' * 4096, 0)")
    for worker in crash(running).values():
        worker.kill()
    (running.runtime_dir / "state.json").unlink()
    after = service(runtime_dir=running.runtime_dir)
    keys = {"backend": "malloc", "size": "8MiB"}
    nowhere = {**keys, "listen": "unix:/nonexistent/a.sock"}
    assert "error" in after.rpc_raw("reactor_start_disk", name="a", keys=nowhere)
    listen = f"unix:{tmp_path}/a.sock"
    after.rpc("reactor_start_disk", name="a", keys={**keys, "listen": listen})
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'l' * 4096")
    assert "error" in after.rpc_raw("reactor_start_disk", name="b", keys=nowhere)


@pytest.mark.parametrize("written", [None, "9" * 8000], ids=["another's", "no pid"])
def test_the_pid_of_another_process_in_a_lock_file_is_not_believed(
    service: Start, tmp_path: Path, written: str | None
) -> None:
    """As for a moment after a worker took the lock that another one had before it."""
    running = service(ram(tmp_path, "a"))
    assert running.stop() == 0
    with subprocess.Popen(["sleep", "100"]) as stranger:
        lock = running.runtime_dir / "worker-0.lock"
        lock.write_text(f"{written or stranger.pid}\n")
        with lock.open() as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            after = again(service, running, await_ready=False)
            after.await_line("is locked by a process that does not say who it is")
        after.await_line("ready:")
        assert stranger.poll() is None
        stranger.kill()


@pytest.mark.parametrize("name", ["state.json", "instance"])
def test_a_pipe_in_the_runtime_directory_is_no_trap(
    service: Start, tmp_path: Path, name: str
) -> None:
    running = service(ram(tmp_path, "a"))
    assert running.stop() == 0
    path = running.runtime_dir / name
    content = path.read_bytes() if path.exists() else None
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    after = again(service, running, await_ready=False)
    assert after.process.wait(60) == 1
    assert "is not a regular file" in after.log
    assert "Traceback" not in after.log
    path.unlink()
    if content is not None:
        path.write_bytes(content)

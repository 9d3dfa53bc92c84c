"""Storage that is gone, or cut short, while nobody serves it: never made anew under a device."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.commands import attached, ctl, fio_verify_command, in_flight, run
from tests.mounting import mounted
from tests.running import RunningService

pytestmark = pytest.mark.kernel
Start = Callable[..., RunningService]

MIB = 1 << 20


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = tmp_path / "store"
    store.mkdir()
    return store


def config(store: Path, size: int = 24) -> str:
    keys = f"path: {store}/image, size: {size}MiB, device: /dev/nbd0"
    return f"disks:\n  x: {{backend: file, {keys}}}\n"


@contextmanager
def mounted_till_lost(folder: Path) -> Iterator[Path]:
    mount = folder / "mount"
    mount.mkdir(exist_ok=True)
    run("mkfs.ext4", "-q", "-F", "/dev/nbd0")
    run("mount", "/dev/nbd0", str(mount))
    try:
        yield mount
    finally:
        run("umount", "-l", str(mount))


def write(mount: Path) -> None:
    with (mount / "file").open("wb", buffering=0) as file:
        file.write(b"data")
        os.fsync(file.fileno())


def again(service: Start, before: RunningService, text: str, *arguments: str) -> RunningService:
    return service(text, *arguments, runtime_dir=before.runtime_dir, await_ready=False)


def check_it_waits_for_its_storage(running: RunningService, state: str, problem: str) -> None:
    """Whatever is asked for, the disk stays down."""
    running.await_line(problem)
    assert problem in running.await_state("x", state)["reason"]
    assert problem in running.rpc_raw("reactor_start_disk", name="x")["error"]["message"]
    running.await_state("x", state)


def end_and_keep(running: RunningService) -> None:
    assert running.stop(signal.SIGUSR1) == 0


def end_all(running: RunningService) -> None:
    workers = running.workers().values()
    for process in (running.process, *workers):
        process.kill()
    running.process.wait()


@pytest.mark.parametrize("keeps_state", [True, False])
@pytest.mark.parametrize("end", [end_and_keep, end_all])
def test_an_image_that_is_gone_at_a_restart_is_not_made_under_a_mount(
    service: Start,
    tmp_path: Path,
    store: Path,
    end: Callable[[RunningService], None],
    keeps_state: bool,
) -> None:
    running = service(config(store))
    with mounted_till_lost(tmp_path) as mount:
        write(mount)
        end(running)
        store.rename(tmp_path / "moved")
        store.mkdir()
        if not keeps_state:
            (running.runtime_dir / "state.json").unlink()
        after = again(service, running, config(store))
        check_it_waits_for_its_storage(after, "failed", "image: is gone")
        assert not list(store.iterdir())
    after.await_true(lambda: not attached("/dev/nbd0"))
    store.rmdir()
    (tmp_path / "moved").rename(store)
    ctl(after.runtime_dir, "start", "x")
    after.await_state("x", "online")
    with mounted("/dev/nbd0", tmp_path / "mount") as mount:
        assert (mount / "file").read_bytes() == b"data"
    assert after.stop() == 0


@pytest.mark.parametrize("end", [end_and_keep, end_all])
def test_an_image_that_is_late_costs_nothing_when_a_strict_start_fails(
    service: Start, tmp_path: Path, store: Path, end: Callable[[RunningService], None]
) -> None:
    running = service(config(store))
    with (tmp_path / "report").open("w+") as report:
        verify = fio_verify_command("/dev/nbd0", "4M", loops="1000", runtime="20", time_based="1")
        with subprocess.Popen(verify, stdout=report, stderr=report) as load:
            running.await_true(lambda: in_flight("/dev/nbd0") > 0)
            end(running)
            store.rename(tmp_path / "moved")
            store.mkdir()
            strict = again(service, running, config(store), "--strict")
            assert strict.process.wait(60) == 1
            assert "not started: x (--strict)" in strict.log
            assert attached("/dev/nbd0")
            store.rmdir()
            (tmp_path / "moved").rename(store)
            after = service(config(store), "--strict", runtime_dir=running.runtime_dir)
            after.await_state("x", "online")
            assert load.wait(60) == 0, report.seek(0) or report.read()
    assert after.stop() == 0


def test_an_image_that_goes_with_its_worker_is_not_made_anew(
    service: Start, tmp_path: Path, store: Path
) -> None:
    running = service(config(store))
    with mounted_till_lost(tmp_path) as mount:
        write(mount)
        (worker,) = running.workers().values()
        store.rename(tmp_path / "moved")
        store.mkdir()
        worker.kill()
        check_it_waits_for_its_storage(running, "failed", "image: is gone")
    running.await_true(lambda: not attached("/dev/nbd0"))
    ctl(running.runtime_dir, "stop", "x")
    ctl(running.runtime_dir, "start", "x")  # the way out
    running.await_state("x", "online")
    assert not any((store / "image").read_bytes())


def test_memory_that_goes_with_its_worker_is_not_made_anew(service: Start) -> None:
    running = service("disks:\n  x: {backend: malloc, size: 8MiB, device: /dev/nbd0}\n")
    instance = (running.runtime_dir / "instance").read_text().strip()
    (memory,) = Path("/dev/shm").glob(f"nbd-reactor-{instance}-*")
    (worker,) = running.workers().values()
    memory.unlink()
    worker.kill()
    check_it_waits_for_its_storage(running, "failed", f"memory {memory} is gone")
    assert not memory.exists()
    ctl(running.runtime_dir, "stop", "x")
    ctl(running.runtime_dir, "start", "x")
    running.await_state("x", "online")


def test_an_image_that_was_cut_short_is_not_filled_up(
    service: Start, tmp_path: Path, store: Path
) -> None:
    running = service(config(store))
    ctl(running.runtime_dir, "resize", "x", "32MiB")  # more than the config says
    end_and_keep(running)
    os.truncate(store / "image", 24 * MIB)
    after = again(service, running, config(store))
    check_it_waits_for_its_storage(after, "failed", f"has only {24 * MIB} bytes")
    assert (store / "image").stat().st_size == 24 * MIB
    os.truncate(store / "image", 32 * MIB)
    ctl(after.runtime_dir, "start", "x")
    assert after.await_state("x", "online")["size"] == 32 * MIB


@pytest.mark.parametrize("end", [end_and_keep, end_all])
def test_an_image_grows_and_shrinks_as_it_is_told(
    service: Start, store: Path, end: Callable[[RunningService], None]
) -> None:
    running = service(config(store))
    ctl(running.runtime_dir, "resize", "x", "16MiB")
    end(running)
    after = service(config(store), runtime_dir=running.runtime_dir)
    assert after.await_state("x", "online")["size"] == 16 * MIB
    end(after)
    last = service(config(store, 48), runtime_dir=after.runtime_dir)
    last.await_true(lambda: last.rpc("reactor_get_disks")[0]["size"] == 48 * MIB)
    last.await_state("x", "online")
    sectors = Path("/sys/block/nbd0/size")
    last.await_true(lambda: int(sectors.read_text()) * 512 == 48 * MIB)
    assert (store / "image").stat().st_size == 48 * MIB

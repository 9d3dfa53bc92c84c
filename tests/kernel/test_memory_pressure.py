"""A host without free memory goes on, also one that swaps to a device of ours."""

from __future__ import annotations

import filecmp
import mmap
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.commands import run
from tests.mounting import mounted_new, swapped_to
from tests.running import RunningService

GIB = 1 << 30
MIB = 1 << 20
MAP_LOCKED = 0x2000  # include/uapi/asm-generic/mman.h
FREE = 100 * MIB  # what the tests leave of a machine's memory
FREE_FOR_SWAP = 60 * MIB
SWAPPED_PAGES = 2000  # so many, and the swapping is well under way
HOG_SECONDS = 50
WRITTEN = 16 * MIB
BEGUN_MAX = 3  # of 128 KiB each; with 4 MiB of socket buffer they are 54

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.skipif(
        psutil.virtual_memory().total > 2 * GIB or "KERNEL_DISK" not in os.environ,
        reason="fills the memory of its machine: only in tools/kernel --disk-size 256M",
    ),
]
Start = Callable[..., RunningService]


def disk(*, direct: bool) -> str:
    path = os.environ["KERNEL_DISK"]
    options = f"path: {path}, direct: {str(direct).lower()}, device: /dev/nbd0"
    return f"disks: {{data: {{backend: file, {options}}}}}"


@contextmanager
def little_memory(free: int = FREE) -> Iterator[None]:
    """Lock all but `free` bytes of the machine's memory."""
    run("sysctl", "-q", "vm.drop_caches=3")
    size = (psutil.virtual_memory().available - free) & -mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE | MAP_LOCKED
    with mmap.mmap(-1, size, flags=flags):
        yield


@contextmanager
def memory_hog(mebibytes: int) -> Iterator[subprocess.Popen[bytes]]:
    script = Path(__file__).with_name("memory_hog.py")
    hog = subprocess.Popen(
        [sys.executable, str(script), str(mebibytes)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        yield hog
    finally:
        hog.kill()
        hog.communicate()


def pages(name: str) -> int:
    """Return a number of /proc/vmstat."""
    found = re.search(rf"^{name} (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def writes_begun(device: str) -> int:
    """Return how many writes the driver has begun to send, when it cannot go on."""
    path = Path(f"/sys/block/{device}/inflight")
    before, now = "", path.read_text()
    while before != now or now.split()[1] == "0":
        time.sleep(0.5)
        before, now = now, path.read_text()
    return int(now.split()[1])


def of(pid: int, field: str) -> str:
    found = re.search(rf"^{field}:\s+(.*)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def spares(running: RunningService) -> list[int]:
    children = psutil.Process(running.process.pid).children()
    titles = {child.pid: " ".join(child.cmdline()) for child in children}
    return [pid for pid, title in titles.items() if title.startswith("nbd-reactor: spare")]


@contextmanager
def swapping(running: RunningService) -> Iterator[None]:
    """Have the machine swap to the device of a service; what is swapped out comes back whole."""
    running.await_true(lambda: bool(spares(running)))
    hog_size = FREE_FOR_SWAP // MIB + 30
    with swapped_to("/dev/nbd0"), little_memory(FREE_FOR_SWAP), memory_hog(hog_size) as hog:
        before = pages("pswpout")
        running.await_true(lambda: pages("pswpout") - before > SWAPPED_PAGES)
        yield
        output, _ = hog.communicate(timeout=HOG_SECONDS)
        assert hog.returncode == 0, output.decode()
    assert "lost a connection" not in running.log
    assert of(running.workers()[0].pid, "VmSwap") == "0 kB"
    assert of(running.process.pid, "VmSwap") == "0 kB"


def test_swap_on_a_device(service: Start) -> None:
    running = service(disk(direct=True), "--lock-memory")
    with swapping(running):
        pass
    assert running.rpc("reactor_get_workers")[0]["restarts"] == 0


def test_swap_on_a_device_whose_worker_dies(service: Start) -> None:
    # Should nobody come in its place, the machine stands still, until tools/kernel ends it.
    running = service(disk(direct=True), "--lock-memory")
    running.await_true(lambda: bool(spares(running)))
    (spare,) = spares(running)
    (worker,) = running.workers().values()
    assert "tmpfs" in run("stat", "--file-system", "--format=%T", str(running.log_path))
    with swapping(running):
        worker.kill()
    # It need not be there still: on a slow machine it may get no memory for ten seconds, and be
    # taken for hung. Then there is another spare.
    running.await_line(f"worker core 0 runs (pid {spare})")


def test_a_worker_that_does_not_read_leaves_the_kernel_its_reserve(service: Start) -> None:
    running = service(
        "disks: {d: {backend: 'null', size: 64MiB, device: /dev/nbd0}}", "--lock-memory"
    )
    (worker,) = running.workers().values()
    fd = os.open("/dev/nbd0", os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, WRITTEN, flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE) as data:
        thread = threading.Thread(target=os.pwrite, args=(fd, data, 0))
        worker.send_signal(signal.SIGSTOP)
        try:
            thread.start()
            begun = writes_begun("nbd0")
        finally:
            worker.send_signal(signal.SIGCONT)
        thread.join()
    os.close(fd)
    assert begun <= BEGUN_MAX


@pytest.mark.parametrize("direct", [True, False])
def test_more_dirty_pages_than_memory(service: Start, tmp_path: Path, direct: bool) -> None:
    running = service(disk(direct=direct))
    (worker,) = running.workers().values()
    with mounted_new("/dev/nbd0", tmp_path / "mount") as mount, little_memory():
        run("dd", "if=/dev/urandom", f"of={mount / 'a'}", "bs=1M", "count=90", "conv=fsync")
        run("cp", str(mount / "a"), str(mount / "b"))
        os.sync()
        assert filecmp.cmp(mount / "a", mount / "b", shallow=False)
    run("fsck.ext4", "-fn", "/dev/nbd0")
    assert worker.is_running()


def test_a_spare_worker_takes_the_place_of_a_dead_one(service: Start) -> None:
    running = service(disk(direct=True), "--lock-memory")
    running.await_true(lambda: bool(spares(running)))
    (spare,) = spares(running)
    for pid in (running.process.pid, running.workers()[0].pid, spare):
        assert of(pid, "VmLck") != "0 kB"
        assert os.sched_getscheduler(pid) == os.SCHED_RR
        assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "-900"
    running.workers()[0].kill()
    running.await_true(lambda: running.workers().get(0, psutil.Process()).pid == spare)
    running.await_true(lambda: spares(running) not in ([], [spare]))


def test_memory_that_cannot_be_locked_is_an_error_at_the_start(tmp_path: Path) -> None:
    output = run(
        *("setpriv", "--bounding-set", "-ipc_lock", "prlimit", "--memlock=8388608"),
        *(sys.executable, "-m", "reactor", "--lock-memory", "--runtime-dir", str(tmp_path / "run")),
        check=False,
    )
    assert output.startswith("nbd-reactor: memory cannot be locked: ")
    assert "CAP_IPC_LOCK" in output
    assert not (tmp_path / "run" / "lock").exists(), "it must end before it begins"

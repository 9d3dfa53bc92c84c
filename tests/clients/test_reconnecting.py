"""Clients that connect again by themselves go on when a worker, or the whole service, has died."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from tests.commands import nbdsh
from tests.running import RunningService

Start = Callable[..., RunningService]

MIB = 1 << 20
END_SECONDS = 120
DISKS = pytest.mark.parametrize("name", ["ram", "file"])


def config(folder: Path) -> str:
    return f"""
disks:
  ram: {{backend: malloc, size: 32MiB, listen: 'unix:{folder}/ram.sock'}}
  file: {{backend: file, path: {folder}/image, size: 32MiB, listen: 'unix:{folder}/file.sock'}}
"""


class Crashes:
    """What befalls the service that the clients are connected to."""

    def __init__(self, start: Start, folder: Path) -> None:
        self.running = start(config(folder))
        self._start = start
        self._config = config(folder)

    def worker_dies(self) -> None:
        """Kill the worker, and wait until another one is in its place."""
        old = self.running.workers()[0]
        old.kill()
        self.running.await_true(lambda: self.running.workers().get(0, old) != old)
        self.running.await_state("ram", "online")
        self.running.await_state("file", "online")

    def controller_dies(self) -> None:
        """Kill the controller, and start another."""
        self.running.process.kill()
        self.running.process.wait()
        self.running = self._start(self._config, runtime_dir=self.running.runtime_dir)

    def all_die(self) -> None:
        """Kill both, and start the service again."""
        worker = self.running.workers()[0]
        self.running.process.kill()
        worker.kill()
        self.controller_dies()

    def writes(self, name: str) -> int:
        disk = self.running.rpc("reactor_get_disks", name=name)[0]
        return int(disk["statistics"].get("writes", 0))


@pytest.fixture
def crashes(service: Start, tmp_path: Path) -> Crashes:
    return Crashes(service, tmp_path)


@contextmanager
def program(*command: str) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """Run a program that is spoken to; yields it, its standard input and its output."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        try:
            yield process, process.stdin, process.stdout
        finally:
            process.kill()
            process.wait()


def qemu_options(folder: Path, name: str) -> str:
    server = f"server.type=unix,server.path={folder}/{name}.sock"
    return f"driver=nbd,{server},export={name},reconnect-delay={END_SECONDS}"


@DISKS
def test_qemu_io_with_a_reconnect_delay(crashes: Crashes, tmp_path: Path, name: str) -> None:
    harms = (crashes.worker_dies, crashes.controller_dies, crashes.all_die, None)
    options = qemu_options(tmp_path, name)
    with program("qemu-io", "--image-opts", options) as (process, orders, answers):

        def order(command: str, answer: str) -> None:
            # One at a time: it waits for more to read, also while it has read more than a line.
            orders.write(f"{command}\n")
            for line in answers:
                assert "failed" not in line, line
                if answer in line:
                    return
            raise AssertionError(f"{command}: it has ended")

        for number, harm in enumerate(harms):
            order(f"write -P {number + 1} {number * MIB} 64k", "wrote 65536/65536 bytes")
            if harm is not None:
                harm()
        for number, _ in enumerate(harms):
            order(f"read -P {number + 1} {number * MIB} 64k", "read 65536/65536 bytes")
        orders.write("quit\n")
        assert process.wait(END_SECONDS) == 0


@DISKS
def test_qemu_with_requests_in_flight(crashes: Crashes, tmp_path: Path, name: str) -> None:
    bench = subprocess.Popen(
        [
            *("qemu-img", "bench", "-w", "-d", "32", "-s", "4096", "-c", "150000"),
            *("--pattern", "97", "--image-opts", qemu_options(tmp_path, name)),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        kills = 0
        while kills < 3 and bench.poll() is None:
            crashes.running.await_true(
                lambda: crashes.writes(name) > 0 or bench.poll() is not None, END_SECONDS
            )
            if bench.poll() is None:
                crashes.worker_dies()
                kills += 1
        output, _ = bench.communicate(timeout=END_SECONDS)
    finally:
        bench.kill()
        bench.communicate()
    assert bench.returncode == 0, output
    assert kills, "it was over before anything happened"
    nbdsh(uri(tmp_path, name), "assert h.pread(32 << 20, 0) == b'a' * (32 << 20)")


def uri(folder: Path, name: str) -> str:
    return f"nbd+unix:///{name}?socket={folder}/{name}.sock"


RETRYING = """
import nbd, sys, time

def connected():
    for _ in range(2000):
        try:
            handle = nbd.NBD()
            handle.connect_uri(sys.argv[1])
            return handle
        except nbd.Error:
            time.sleep(0.05)
    sys.exit("cannot connect again")

handle, errors = connected(), 0
for number in range(400):
    while True:
        try:
            handle.pwrite(number.to_bytes(4, "big") * 128, number * 512, nbd.CMD_FLAG_FUA)
            break
        except nbd.Error:
            errors += 1
            handle = connected()
    print(number, flush=True)
    sys.stdin.readline()
for number in range(400):
    assert handle.pread(512, number * 512) == number.to_bytes(4, "big") * 128, number
print("errors", errors, flush=True)
"""


@DISKS
def test_a_libnbd_program_that_tries_again(crashes: Crashes, tmp_path: Path, name: str) -> None:
    harms = {
        50: crashes.worker_dies,
        150: crashes.controller_dies,
        250: crashes.all_die,
        350: crashes.worker_dies,
    }
    with program("/usr/bin/python3", "-c", RETRYING, uri(tmp_path, name)) as (process, go, answers):
        for line in answers:
            if line.startswith("errors"):
                break
            harms.get(int(line), lambda: None)()
            go.write("\n")
        assert process.wait(END_SECONDS) == 0
    assert line.split() == ["errors", "3"], "one for each worker that died"

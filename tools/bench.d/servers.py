"""The servers that are compared, each on the disks that it can serve."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final

import processes
import psutil

from backends import sharedmemory
from reactor.control.runtime import RuntimeDir

HERE: Final = Path(__file__).parent
EXPORT: Final = "bench"
START_SECONDS: Final = 30.0
OURS: Final = "nbd-reactor"
MANY_DISKS: Final = 64
EMPTY_DISK: Final = MANY_DISKS - 1  # a large one, of which most was never written
EMPTY_MIB: Final = 2048  # its size, or a quarter of the memory that is free
MANY: Final = f"{OURS}, {MANY_DISKS} disks"
FLOOR: Final = "floor"


class BenchError(Exception):
    """Something that was to be measured does not work; the others go on."""


@dataclass(frozen=True)
class Place:
    """Where one server runs: its own folder, the image of its disk, its core."""

    folder: Path
    image: Path
    size: int  # bytes
    core: int
    floor: Path | None  # the program, when it could be compiled

    @property
    def socket(self) -> Path:
        """Where it listens."""
        return self.folder / "socket"

    @property
    def pid_file(self) -> Path:
        """Where a server that leaves for the background says its pid."""
        return self.folder / "pid"


Command = Callable[[Place], list[str]]


def _reactor(place: Place, disks: str, *options: str) -> list[str]:
    config = place.folder / "disks.yaml"
    config.write_text(f"disks:\n{disks}")
    command = [sys.executable, "-m", "reactor", "--runtime-dir", str(place.folder / "run")]
    return [*command, "--cores", str(place.core), "--config", str(config), *options]


def _reactor_disk(*keys: str, options: Sequence[str] = ()) -> Command:
    def command(place: Place) -> list[str]:
        values = [key.format(size=place.size, image=place.image) for key in keys]
        disk = f"{{{', '.join([*values, f'listen: unix:{place.socket}'])}}}"
        return _reactor(place, f"  {EXPORT}: {disk}\n", *options)

    return command


def reactor_with_many_disks(place: Place) -> list[str]:
    """Return the command for a service with many disks, all empty, on sockets `socket-N`."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    sizes = [64] * EMPTY_DISK + [max(64, min(EMPTY_MIB, free // 4))]
    disk = "  d{0}: {{backend: malloc, size: {1}MiB, listen: unix:{2}-{0}}}\n"
    disks = (disk.format(number, size, place.socket) for number, size in enumerate(sizes))
    return _reactor(place, "".join(disks))


def _nbdkit(*plugin: str) -> Command:
    def command(place: Place) -> list[str]:
        words = [word.format(size=place.size, image=place.image, here=HERE) for word in plugin]
        return ["nbdkit", "-f", "-U", str(place.socket), *words]

    return command


def _qemu(*options: str) -> Command:
    def command(place: Place) -> list[str]:
        serve = [
            "qemu-nbd",
            "--persistent",
            "--shared=8",
            "--format=raw",
            f"--export-name={EXPORT}",
        ]
        return [*serve, *options, f"--socket={place.socket}", str(place.image)]

    return command


def _nbd_server(place: Place) -> list[str]:
    config = place.folder / "config"
    config.write_text(
        f"[generic]\nunixsock = {place.socket}\n[{EXPORT}]\nexportname = {place.image}\n"
    )
    return ["nbd-server", "-C", str(config), "-p", str(place.pid_file)]


def _floor(place: Place) -> list[str]:
    return [str(place.floor), str(place.socket), str(place.size)]


#: By kind of disk and server, ours first: the others are compared to it.
COMMANDS: Final[Mapping[str, Mapping[str, Command]]] = {
    "memory": {
        OURS: _reactor_disk("backend: malloc", "size: {size}"),
        FLOOR: _floor,
        "nbdkit": _nbdkit("memory", "{size}"),
        "qemu-nbd": _qemu(),
        "nbd-server": _nbd_server,
    },
    "file": {
        OURS: _reactor_disk("backend: file", "path: {image}"),
        "nbdkit": _nbdkit("file", "{image}"),
        "qemu-nbd": _qemu(),
        "nbd-server": _nbd_server,
    },
    "direct": {
        OURS: _reactor_disk("backend: file", "path: {image}", "direct: true"),
        "qemu-nbd": _qemu("--cache=none", "--aio=io_uring"),
    },
    "python": {
        OURS: _reactor_disk("backend: python", "size: {size}"),
        "nbdkit": _nbdkit("python", "{here}/nbdkit_disk.py", "bytes={size}"),
    },
}
#: Ours, made to behave the same however fast it runs.
COUNTED: Final = _reactor_disk("backend: malloc", "size: {size}", options=("--mode", "interrupt"))
#: On the image of our `direct` disk itself: what the storage can do.
NATIVE_ENGINES: Final = ("fio io_uring", "fio libaio")
#: These two keep the disk in anonymous memory, which is not theirs.
ANONYMOUS: Final = frozenset({("memory", "nbdkit"), ("python", "nbdkit"), ("python", OURS)})


def missing(kind: str, name: str, floor: Path | None) -> str | None:
    """Return why a server cannot run here."""
    if name == FLOOR:
        return None if floor else "floor: needs gcc"
    if name == OURS:
        return None
    if shutil.which(name) is None:
        return f"{name}: not installed (Debian package {name.replace('qemu-nbd', 'qemu-utils')})"
    if kind == "python":
        plugin = ["nbdkit", "python", "--dump-plugin"]
        if subprocess.run(plugin, capture_output=True, check=False).returncode:
            return "nbdkit's Python plugin: not installed (Debian package nbdkit-plugin-python)"
    return None


@dataclass(frozen=True)
class Server:
    """A server that runs."""

    name: str
    kind: str
    place: Place
    pid: int

    @property
    def uri(self) -> str:
        """For other clients."""
        return f"nbd+unix:///{EXPORT}?socket={self.place.socket}"

    def resident_bytes(self) -> list[int]:
        """Return the memory of each of its processes, without that of a memory disk."""
        found = processes.resident_bytes(self.pid)
        if found and (self.kind, self.name) in ANONYMOUS:
            found[found.index(max(found))] -= self.place.size
        return found


@contextlib.contextmanager
def running(
    name: str,
    kind: str,
    command: Command,
    place: Place,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """Run a server on its core until the end of the context; raises BenchError."""
    place.folder.mkdir()
    words = command(place)
    path = [str(HERE / "python_disk"), *filter(None, [os.environ.get("PYTHONPATH")])]
    log = place.folder / "log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            processes.pinned(place.core, *words),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
        )
    pid = started.pid
    try:
        _await(name, place, started, log)
        if place.pid_file.exists():  # it left for the background
            started.wait()
            pid = int(place.pid_file.read_text())
        yield Server(name, kind, place, pid)
    except (OSError, psutil.Error) as error:
        raise BenchError(f"{name}: {error}: {_tail(log)}") from error
    finally:
        processes.stop(processes.tree(pid))
        started.wait()
        if (place.folder / "run/instance").exists():
            _end_what_outlived_it(place)


def _end_what_outlived_it(place: Place) -> None:
    """End the workers of a controller of ours that was killed, and remove their memory disks."""
    runtime = RuntimeDir(place.folder / "run")
    for worker in runtime.surviving_workers():
        signal.pidfd_send_signal(worker.pidfd, signal.SIGKILL)
        select.select([worker.pidfd], [], [], processes.STOP_SECONDS)
        os.close(worker.pidfd)
    for disk in sharedmemory.names(runtime.instance):
        sharedmemory.shared_memory(disk, runtime.instance).unlink()
    runtime.close()


def _await(name: str, place: Place, started: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not (b"ready:" in log.read_bytes() if name == OURS else _listens(place.socket)):
        # Only nbd-server leaves for the background.
        if started.poll() is not None and (started.returncode or name != "nbd-server"):
            raise BenchError(f"{name}: exit status {started.returncode}: {_tail(log)}")
        if time.monotonic() > deadline:
            raise BenchError(f"{name}: does not listen: {_tail(log)}")
        time.sleep(0.01)


def _listens(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        return True
    return False


def _tail(log: Path) -> str:
    return log.read_text(errors="replace")[-500:].strip()

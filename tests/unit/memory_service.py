"""The Service of the RPC's unit tests: its rules are real, its disks are only entries."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import replace

from reactor.control.service import DiskState, DiskStatus, Done, WorkerStatus
from reactor.loop import Reactor
from reactor.protocol.wire import (
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_TRIM,
)
from reactor.spec import DiskSpec

DEVICES = ("/dev/nbd0", "/dev/nbd1")


class MemoryService:
    """Answers one turn later, as the controller does, unless `held` keeps the answers back."""

    def __init__(self, reactor: Reactor) -> None:
        self.reactor = reactor
        self.started_at = time.time()
        self.started_ns = time.monotonic_ns()
        self.held: list[Callable[[], None]] | None = None
        self.errors: dict[str, Exception] = {}  # what the next call of this name ends with
        self._disks: dict[str, DiskStatus] = {}

    def disks(self) -> list[DiskStatus]:
        return list(self._disks.values())

    def disk(self, name: str) -> DiskStatus | None:
        return self._disks.get(name)

    def workers(self) -> list[WorkerStatus]:
        counters = {"busy_ns": 250_000_000, "idle_ns": 750_000_000, "turns": 9}
        return [WorkerStatus(0, 4242, "running", 1, tuple(self._disks), counters)]

    def create(self, spec: DiskSpec, done: Done) -> None:
        if spec.name in self._disks:
            done(OSError(errno.EEXIST, f"there is a disk {spec.name} already"))
            return

        def create() -> None:
            size = spec.options.get("size", 1 << 20)
            flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_TRIM
            if spec.readonly:
                flags |= NBD_FLAG_READ_ONLY
            counters = {"reads": 3, "read_bytes": 12288, "connections": 1}
            self._disks[spec.name] = DiskStatus(
                spec, "online", "", (0,), size, spec.block_size or 512, flags, None, counters
            )

        self._later("create", create, done)

    def start(self, name: str, done: Done) -> None:
        self._change(name, "online", done)

    def stop(self, name: str, done: Done) -> None:
        self._change(name, "stopped", done)

    def remove(self, name: str, done: Done) -> None:
        if self._known(name, done):
            self._later("remove", lambda: self._disks.pop(name, None), done)

    def resize(self, name: str, size: int, done: Done) -> None:
        def resize() -> None:
            self._disks[name] = replace(self._disks[name], size=size)

        if self._known(name, done):
            self._later("resize", resize, done)

    def attach(
        self, name: str, device: str | None, done: Callable[[str | Exception], None]
    ) -> None:
        used = {disk.device for disk in self._disks.values()}
        free = [path for path in DEVICES if path not in used]
        path = device or (free[0] if free else None)
        if path is None or path in used:
            done(OSError(errno.EBUSY, "every device is in use"))
            return

        def attach() -> None:
            self._disks[name] = replace(self._disks[name], device=path)

        self._later("attach", attach, lambda error: done(error or path))

    def detach(self, device: str, done: Done) -> None:
        disk = next((disk for disk in self._disks.values() if disk.device == device), None)
        if disk is None:
            done(OSError(errno.ENODEV, f"{device} is not a device of this service"))
            return

        def detach() -> None:
            self._disks[disk.spec.name] = replace(disk, device=None)

        self._later("detach", detach, done)

    def reload(self, done: Done) -> None:
        self._later("reload", lambda: None, done)

    def shut_down(self) -> None:
        self.reactor.stop()

    def _change(self, name: str, state: DiskState, done: Done) -> None:
        def change() -> None:
            self._disks[name] = replace(self._disks[name], state=state)

        if self._known(name, done):
            self._later(state, change, done)

    def _known(self, name: str, done: Done) -> bool:
        if name not in self._disks:
            done(OSError(errno.ENODEV, f"there is no disk {name}"))
        return name in self._disks

    def _later(self, what: str, change: Callable[[], object], done: Done) -> None:
        def finish() -> None:
            error = self.errors.pop(what, None)
            if error is None:
                change()
            done(error)

        if self.held is not None:
            self.held.append(finish)
        else:
            self.reactor.call_from_thread(finish)

"""What disks stand on: named memory and files. They outlive every process."""

from __future__ import annotations

import errno
from random import Random
from typing import Any

from reactor.spec import DiskSpec
from tests.simulation.causes import Causes
from tests.simulation.faults import NO_MEMORY, Faults
from tests.simulation.world import World

BLOCK_SIZE = 4096


class Storage:
    """Blocks with numbers in them, and the processes that have it open."""

    def __init__(self, key: str, size: int) -> None:
        self.key = key
        self.size = size
        self.hung = False  # the medium does nothing
        self.blocks: dict[int, int] = {}  # as every process sees them
        self._durable: dict[int, int] = {}  # what the host cannot lose
        self.openers: dict[Any, str | None] = {}  # by process: who it shares it with, None: nobody

    def __repr__(self) -> str:
        return self.key

    def flush(self) -> None:
        """Make durable what was written."""
        self._durable = dict(self.blocks)

    def lose_unflushed(self, random: Random) -> None:
        """Keep what is durable; of the rest, what happens to have been written back."""
        for block in self.blocks:
            if random.random() < 0.5:
                self.blocks[block] = self._durable.get(block, 0)
        self._durable = dict(self.blocks)
        self.openers.clear()
        self.hung = False


class Store:
    """All storage of the host."""

    def __init__(self, world: World, faults: Faults, causes: Causes) -> None:
        self._world = world
        self._faults = faults
        self._causes = causes
        self._storages: dict[str, Storage] = {}
        self.forgotten: set[str] = set()  # disks of which a controller knew what it could not save
        self.refusals: dict[str, OSError] = {}  # by disk: why it cannot be opened now

    @staticmethod
    def key(backend: str, disk: str, options: Any) -> str:
        """Return what names the storage of a disk."""
        return f"file {options['path']}" if backend == "file" else f"{backend} {disk}"

    def find(self, spec: DiskSpec) -> Storage | None:
        """Return the storage of a disk, if there is one."""
        return self._storages.get(self.key(spec.backend, spec.name, spec.options))

    def open(self, process: Any, spec: DiskSpec, *, shared: bool) -> Storage:
        """Open the storage of a disk, making it when it is not there; raises OSError."""
        key = self.key(spec.backend, spec.name, spec.options)
        if spec.name in self.refusals:
            refusal = self.refusals[spec.name]
            self._causes.strike(spec.name, str(refusal.strerror))
            raise refusal
        try:
            self._faults.check("no memory to open a disk", NO_MEMORY)
        except OSError as shortage:
            self._causes.strike(spec.name, str(shortage.strerror))
            raise
        storage = self._storages.get(key)
        size = spec.options.get("size")
        if storage is None:
            if size is None:
                raise OSError(errno.ENOENT, "no such file, and no size to create it")
            storage = self._storages[key] = Storage(key, size)
        mark = spec.name if shared else None
        for other, mark_of_other in storage.openers.items():
            if other is not process and (mark is None or mark != mark_of_other):
                if (
                    spec.backend == "null" and spec.name not in self.forgotten
                ):  # nothing but the controller keeps it to one worker
                    self._world.violate(f"{process} opens {storage}, which {other} serves")
                raise OSError(errno.EBUSY, "is held by another worker")
        if size is not None and (spec.backend != "file" or size > storage.size):
            storage.size = size  # a file is never cut
        storage.openers[process] = mark
        return storage

    def close(self, process: Any, storage: Storage) -> None:
        """Close it, as a process does or as its end does."""
        storage.openers.pop(process, None)

    def discard(self, backend: str, disk: str) -> None:
        """Remove the memory of a disk; files stay."""
        if backend == "malloc":
            storage = self._storages.pop(f"malloc {disk}", None)
            if storage is not None:
                self._world.note("memory of disk %s is discarded", disk)
                users = ", ".join(str(process) for process in storage.openers if process.alive)
                if users and disk not in self.forgotten:
                    self._world.violate(f"memory of disk {disk} is discarded under {users}")

    def pick(self) -> Storage | None:
        """Return any of them."""
        return self._world.random.choice(list(self._storages.values()) or [None])

    def crash(self) -> None:
        """Lose what a host loses without power: all memory, and what was not flushed."""
        for key in [key for key in self._storages if not key.startswith("file")]:
            del self._storages[key]
        for storage in self._storages.values():
            storage.lose_unflushed(self._world.random)

    def heal(self) -> None:
        """Let all media work."""
        self.refusals.clear()
        for storage in self._storages.values():
            storage.hung = False

    def memories(self) -> list[str]:
        """Return the disks that have memory."""
        keys = (key.partition(" ") for key in self._storages)
        return [disk for backend, _, disk in keys if backend == "malloc"]

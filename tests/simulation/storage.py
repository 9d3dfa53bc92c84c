"""What disks stand on: named memory and files. They outlive every process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from random import Random
from typing import Any

from reactor.spec import DiskSpec
from tests.simulation.causes import Causes
from tests.simulation.faults import NO_MEMORY, Faults
from tests.simulation.world import World

BLOCK_SIZE = 4096
LOST = "is gone or cut short"


class Storage:
    """Blocks with numbers in them, and the processes that have it open."""

    def __init__(self, key: str, size: int) -> None:
        self.key = key
        self.size = size
        self.cut_from = 0  # bytes that it had before someone cut it
        self.hung = False  # the medium does nothing
        self.outlasts = False  # ... also when all other faults are over
        self.outlasted = False  # ... once
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
        self.hung = self.outlasts = False


class Store:
    """All storage of the host."""

    def __init__(self, world: World, faults: Faults, causes: Causes) -> None:
        self._world = world
        self._faults = faults
        self._causes = causes
        self._storages: dict[str, Storage] = {}
        self.forgotten: set[str] = set()  # disks of which a controller knew what it could not save
        self.lost: dict[str, Storage] = {}  # by key: moved away
        self.relied_on: set[str] = set()  # keys of what must not be made again
        self.on_made_anew: Callable[[str], None] = lambda disk: None
        self.refusals: dict[str, OSError] = {}  # by disk: why it cannot be opened now
        self.sizes_max: dict[str, int] = {}  # by disk: bytes to which it can grow

    @staticmethod
    def key(backend: str, disk: str, options: Any) -> str:
        """Return what names the storage of a disk."""
        return f"file {options['path']}" if backend == "file" else f"{backend} {disk}"

    def find(self, spec: DiskSpec) -> Storage | None:
        """Return the storage of a disk, if there is one."""
        key = self.key(spec.backend, spec.name, spec.options)
        return self._storages.get(key) or self.lost.get(key)

    def open(self, process: Any, spec: DiskSpec, *, shared: bool, least: int) -> Storage:
        """Open the storage of a disk, making it when it is not there; raises OSError."""
        key = self.key(spec.backend, spec.name, spec.options)
        self._check_openable(process, spec, shared=shared)
        storage = self._storages.get(key)
        size = spec.options.get("size")
        self.check_size(spec.name, size or 0)
        if storage is None:
            if size is None:
                raise OSError(errno.ENOENT, "no such file, and no size to create it")
            self._check_new(spec.name, key, least)
            storage = self._storages[key] = Storage(key, size)
        if spec.backend != "null":
            self._check_size(storage, spec.name, least)
        mark = spec.name if shared else None
        for other, mark_of_other in storage.openers.items():
            if other is not process and (mark is None or mark != mark_of_other):
                if (
                    spec.backend == "null" and spec.name not in self.forgotten
                ):  # nothing but the controller keeps it to one worker
                    self._world.violate(f"{process} opens {storage}, which {other} serves")
                raise OSError(errno.EBUSY, "is held by another worker")
        if size is not None and (spec.backend == "null" or size > storage.size):
            storage.size = size  # nothing is cut
        storage.openers[process] = mark
        return storage

    def _check_openable(self, process: Any, spec: DiskSpec, *, shared: bool) -> None:
        if spec.name in self.refusals:
            refusal = self.refusals[spec.name]
            self._causes.strike(spec.name, str(refusal.strerror))
            raise refusal
        try:
            self._faults.check("no memory to open a disk", NO_MEMORY, process.core)
        except OSError as shortage:
            if not shared or self._faults.short_core is None:  # else the others have it
                self._causes.strike(spec.name, str(shortage.strerror))
            raise

    def check_size(self, disk: str, size: int) -> None:
        """Raise OSError if the storage of a disk cannot have so many bytes."""
        if size > self.sizes_max.get(disk, size):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _check_new(self, disk: str, key: str, least: int) -> None:
        if key.startswith("null"):
            return
        if least:
            self._causes.strike(disk, LOST)
            raise OSError(errno.ENOENT, LOST)
        if key in self.relied_on:
            self._world.violate(f"{key} is made anew under disk {disk}")
        if self.lost.pop(key, None) is not None:
            self.on_made_anew(disk)

    def _check_size(self, storage: Storage, disk: str, least: int) -> None:
        if storage.size < least:
            if storage.cut_from:
                self._causes.strike(disk, LOST)
            raise OSError(errno.EINVAL, LOST)
        if storage.cut_from and not least and storage.key in self.relied_on:
            self._world.violate(f"{storage}, which was cut, grows under disk {disk}")

    def lose(self, storage: Storage) -> None:
        """Take it away; who has it open keeps it."""
        if self._storages.get(storage.key) is storage:
            self._world.note("%s is moved away", storage)
            self.lost[storage.key] = self._storages.pop(storage.key)

    def cut(self, storage: Storage) -> None:
        """Take half of it."""
        self._world.note("%s is cut", storage)
        storage.cut_from = storage.cut_from or storage.size
        storage.size //= 2

    def bring_back(self, key: str) -> None:
        """Have it as it was, unless something else is there now."""
        if key in self.lost:
            self._storages[key] = self.lost.pop(key)
        storage = self._storages.get(key)
        if storage is not None:
            self._world.note("%s is back", key)
            storage.size = max(storage.size, storage.cut_from)
            storage.cut_from = 0

    def close(self, process: Any, storage: Storage) -> None:
        """Close it, as a process does or as its end does."""
        storage.openers.pop(process, None)

    def discard(self, backend: str, disk: str) -> None:
        """Remove the memory of a disk; files stay."""
        if backend == "malloc":
            storage = self._storages.pop(f"malloc {disk}", None)
            self.lost.pop(f"malloc {disk}", None)
            self.relied_on.discard(f"malloc {disk}")
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
        for key in [key for key in self.lost if not key.startswith("file")]:
            del self.lost[key]
        self.relied_on.clear()
        for storage in self._storages.values():
            storage.lose_unflushed(self._world.random)

    def heal(self) -> None:
        """Let all media work."""
        self.refusals.clear()
        for storage in self._storages.values():
            storage.hung = storage.outlasts

    def memories(self) -> list[str]:
        """Return the disks that have memory."""
        keys = (key.partition(" ") for key in self._storages)
        return [disk for backend, _, disk in keys if backend == "malloc"]

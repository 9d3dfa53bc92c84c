"""What disks stand on: named memory and files. They outlive every process."""

from __future__ import annotations

import errno
import os
from typing import Any

from reactor.spec import DiskSpec
from tests.simulation.world import World

BLOCK_SIZE = 4096


class Storage:
    """Blocks with numbers in them, and the processes that have it open."""

    def __init__(self, key: str, size: int) -> None:
        self.key = key
        self.size = size
        self.hung = False  # the medium does nothing
        self.blocks: dict[int, int] = {}
        self.openers: dict[Any, str | None] = {}  # by process: who it shares it with, None: nobody

    def __repr__(self) -> str:
        return self.key


class Store:
    """All storage of the host."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._storages: dict[str, Storage] = {}
        self.forgotten = False  # a controller died with something that could not be saved
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
            raise self.refusals[spec.name]
        storage = self._storages.get(key)
        size = spec.options.get("size")
        if storage is None:
            if size is None:
                raise OSError(errno.ENOENT, "no such file, and no size to create it")
            storage = self._storages[key] = Storage(key, size)
        mark = spec.name if shared else None
        for other, mark_of_other in storage.openers.items():
            if other is not process and (mark is None or mark != mark_of_other):
                if spec.backend == "null":  # nothing but the controller keeps it to one worker
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
                if users and not self.forgotten:
                    self._world.violate(f"memory of disk {disk} is discarded under {users}")

    def pick(self) -> Storage | None:
        """Return any of them."""
        return self._world.random.choice(list(self._storages.values()) or [None])

    def heal(self) -> None:
        """Let all media work."""
        self.refusals.clear()
        for storage in self._storages.values():
            storage.hung = False

    def memories(self) -> list[str]:
        """Return the disks that have memory."""
        return [key for key in self._storages if key.startswith("malloc")]


def error(number: int) -> OSError:
    """Return the error of a number."""
    return OSError(number, os.strerror(number))

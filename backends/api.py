"""The contract between the data path and a storage backend.

`Backend` (a type of storage) makes a `Disk`; `Disk.open` gives a `Descriptor`, which holds the
write claim and hears of events; a `Channel` is one worker's private handle for submitting I/O.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from enum import Enum
from typing import ClassVar, Final, Protocol, TypeAlias

from reactor.loop import Reactor
from reactor.protocol.wire import (
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
)
from reactor.spec import Key

Buffer: TypeAlias = bytes | bytearray | memoryview
#: (command, command flags, cookie, offset, length, payload). A plain tuple: an object per request
#: costs more than serving it. The payload is valid only until `submit` returns.
Request: TypeAlias = tuple[int, int, int, int, int, memoryview | None]
COMMAND: Final = 0
FLAGS: Final = 1
COOKIE: Final = 2
OFFSET: Final = 3
LENGTH: Final = 4
PAYLOAD: Final = 5

CHUNK_SHIFT: Final = 16  # chunks of 64 KiB; see `MappedMemory`
DONE: Final = b""  # what `submit` returns for a finished request that carries no data


def no_memory() -> OSError:
    """Return what a request fails with that lacks memory before anything of it was begun.

    A MemoryError that a channel lets through ends the worker: nobody knows how far it came.
    """
    return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


class Busy(Exception):
    """The channel has no room now: keep the request and submit it again on `resume`."""


class Event(Enum):
    """What a disk tells the holders of its descriptors."""

    REMOVE = "remove"
    RESIZE = "resize"


class Holder(Protocol):
    """Who holds lent buffers until a peer has taken their bytes."""

    def give_back(self) -> None:
        """Copy and release what a peer keeps waiting; called from inside anyone's `submit`."""


class Releasable(Protocol):
    """A lent buffer."""

    def release(self) -> None:
        """Give the buffer back to its pool."""

    def blocked(self, holder: Holder) -> None:
        """Hear that `holder` waits for its peer: asked to give back once the pool is empty."""


class Owner(Protocol):
    """Who submits requests: a connection, or a filter above this channel."""

    def complete(
        self, request: Request, error: int, data: Buffer, lent: Releasable | None = None
    ) -> None:
        """Take the result of a pending request: `error` is an errno, 0 for success.

        Called exactly once per pending request, never from inside `submit`. `lent.release()`
        is due once `data` has left.
        """

    def resume(self) -> None:
        """Submit again what was refused with `Busy`, in the order it came."""


class MappedMemory(Protocol):
    """A disk whose bytes are memory of this process.

    `backed` has a byte per chunk of `1 << CHUNK_SHIFT` bytes: only where it is not 0 may the data
    be touched; elsewhere that might kill the process.
    """

    @property
    def data(self) -> memoryview:
        """The bytes of the disk; another view after a resize."""

    @property
    def backed(self) -> memoryview | bytearray:
        """For each chunk, whether all of it may be touched."""

    def is_backed(self, begin: int, end: int) -> bool:
        """Return whether all chunks of `begin..end` may be touched."""


class Channel(ABC):
    """One worker's handle for I/O to one disk. Requests come validated; failures are OSError."""

    #: Plain reads and writes are done here without `submit`.
    memory: MappedMemory | None = None

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self._waiting: deque[Owner] = deque()

    @abstractmethod
    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        """Do `request`: the data (READ) or `DONE` when finished, None when pending.

        Raises OSError with the errno for the client, or `Busy` when there is no room now.
        """

    def abandon(self, owner: Owner) -> None:
        """Complete at once, undone, what is queued for `owner` and has not begun: it is gone."""

    def kick(self) -> None:
        """Start what this turn's `submit` calls queued. Registered with `Reactor.mark_kick`."""

    def rest(self) -> None:
        """Give memory back that only traffic needs: there is none for now."""

    def close(self) -> None:
        """Release what the channel holds. Nothing is in flight any more."""

    def refuse(self, owner: Owner) -> Busy:
        """Note that `owner` waits for room; returns the exception to raise."""
        if owner not in self._waiting:
            self._waiting.append(owner)
        return Busy()

    def room(self) -> None:
        """Let everyone who was refused try again, first come first served."""
        for _ in range(len(self._waiting)):
            self._waiting.popleft().resume()


class SimpleChannel(Channel):
    """A channel for backends that answer at once: override the verbs that the disk can do."""

    @abstractmethod
    def read(self, offset: int, length: int) -> Buffer:
        """Return `length` bytes at `offset`."""

    def write(self, offset: int, data: memoryview, *, fua: bool) -> None:
        """Store `data` at `offset`, durably if `fua`."""
        raise OSError(errno.EPERM, "the backend cannot write")

    def flush(self) -> None:
        """Make every finished write durable."""

    def trim(self, offset: int, length: int) -> None:
        """Forget `length` bytes at `offset`."""

    def write_zeroes(self, offset: int, length: int, *, may_trim: bool, fua: bool) -> None:
        """Make `length` bytes at `offset` read as zeroes."""
        raise OSError(errno.EOPNOTSUPP, "the backend cannot write zeroes")

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        try:
            return self._do(request)
        except MemoryError:
            raise no_memory() from None

    def _do(self, request: Request) -> Buffer:
        command, flags, _cookie, offset, length, payload = request
        if command == NBD_CMD_READ:
            return self.read(offset, length)
        fua = bool(flags & NBD_CMD_FLAG_FUA)
        if command == NBD_CMD_WRITE:
            assert payload is not None
            self.write(offset, payload, fua=fua)
        elif command == NBD_CMD_FLUSH:
            self.flush()
        elif command == NBD_CMD_TRIM:
            self.trim(offset, length)
            if fua:
                self.flush()
        elif command != NBD_CMD_CACHE:
            may_trim = not flags & NBD_CMD_FLAG_NO_HOLE
            self.write_zeroes(offset, length, may_trim=may_trim, fua=fua)
        return DONE


class Disk(ABC):
    """One named, sized, block-addressed instance of a backend.

    `size` (bytes) is a multiple of `block_size` (bytes, a power of two from 512 to 65536).
    """

    can_flush: ClassVar[bool] = True
    can_multi_conn: ClassVar[bool] = False  # a flush on one channel covers writes on all
    can_share: ClassVar[bool] = False  # ... also on those of other processes, which see the same
    is_rotational: ClassVar[bool] = False
    # These three may differ between disks of one backend (a file system without holes).
    can_trim: bool = False
    can_write_zeroes: bool = False  # else zeroes are written
    can_fua: bool = False  # else FUA is a write and a flush

    def __init__(self, name: str, size: int, block_size: int, *, readonly: bool) -> None:
        self.name = name
        self.size = size
        self.block_size = block_size
        self.readonly = readonly
        self.made = False  # it did not exist before, so that `discard` loses nothing
        #: The open file that all I/O to the data goes through, and whose locks last as long as
        #: that: by it the workers that share the disk keep out of each other's way.
        self.lock_fd: int | None = None
        self._descriptors: list[Descriptor] = []

    @abstractmethod
    def channel(self, reactor: Reactor) -> Channel:
        """Return a new channel for the worker that runs `reactor`."""

    def open(self, on_event: Callable[[Event, str], None], *, write: bool) -> Descriptor:
        """Open the disk; raises OSError EPERM when it is read-only or another writer holds it."""
        if write and self.readonly:
            raise OSError(errno.EPERM, f"disk {self.name} is read-only")
        if write and any(held.write for held in self._descriptors):
            raise OSError(errno.EPERM, f"disk {self.name} is claimed by another writer")
        descriptor = Descriptor(self, on_event, write=write)
        self._descriptors.append(descriptor)
        return descriptor

    def notify(self, event: Event, reason: str) -> None:
        """Tell every open descriptor of `event`; `reason` is for the log."""
        for descriptor in list(self._descriptors):
            descriptor.on_event(event, reason)

    def resize(self, size: int) -> None:
        """Change the size (bytes, a multiple of the block size) or raise OSError."""
        raise OSError(errno.EOPNOTSUPP, f"disk {self.name} cannot change its size")

    def follow(self, size: int) -> None:
        """Take over the size (bytes) that a shared disk gets by `resize` in another process.

        Called after it when the disk grows, before it when it shrinks.
        """
        self.size = size

    def close(self) -> None:
        """Release what the disk holds. Every descriptor is closed."""

    def forget(self, descriptor: Descriptor) -> None:
        """Drop a descriptor that is being closed."""
        self._descriptors.remove(descriptor)


class Descriptor:
    """An open of a disk, with its write claim and event callback."""

    def __init__(self, disk: Disk, on_event: Callable[[Event, str], None], *, write: bool) -> None:
        self.disk = disk
        self.on_event = on_event
        self.write = write

    def close(self) -> None:
        """Give up the claim and hear of no more events."""
        self.disk.forget(self)


class Backend(ABC):
    """A type of storage. `keys` are the keys of disks.yaml beyond those of every disk."""

    name: ClassVar[str]
    product_name: ClassVar[str]  # SPDK's name for it, shown by bdev_get_bdevs
    about: ClassVar[str] = ""  # for the manual: what its disks are, in one line
    keys: ClassVar[tuple[Key, ...]]
    disk: ClassVar[type[Disk]]  # what `create` returns: its abilities, before it is made

    @classmethod
    def check(cls, options: Mapping[str, object], block_size: int | None) -> list[tuple[str, str]]:
        """Return (key, problem) pairs that can be told before the disk is opened.

        Called only with options whose types are right; must not change anything.
        """
        return []

    @classmethod
    def await_storage(cls, options: Mapping[str, object]) -> None:
        """Wait until the storage answers; called before `create`, in a thread, for it may hang.

        Raises OSError; a disk that cannot be opened is told by `create`.
        """

    @classmethod
    @abstractmethod
    def create(
        cls,
        name: str,
        options: Mapping[str, object],
        *,
        instance: str,
        reactor: Reactor,
        block_size: int | None,
        readonly: bool,
        shared: bool,
        least: int,
    ) -> Disk:
        """Open or make the disk; raises OSError with a clear text, EBUSY when others use it.

        `instance` names this service on the host: what outlives a worker (shared memory) carries
        it in its name, so that the next worker finds it and no other service does. `shared`: other
        workers of this service open the same disk; only for a disk that `can_share`. `least`: the
        bytes that the disk's storage had when it was last open. What keeps data must fail when it
        has less now, and neither make nor grow it: somebody may rely on it. 0: it may be made.
        """

    @classmethod
    def discard(cls, name: str, instance: str) -> None:
        """Remove what the disk keeps outside its worker. No worker holds the disk any more."""

    @classmethod
    def leftovers(cls, instance: str) -> list[str]:
        """Return the names of the disks of which something is kept outside any worker."""
        return []

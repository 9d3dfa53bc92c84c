"""What a channel needs for I/O that may block: operations that end later, off the loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final, TypeAlias

from backends.buffers import AlignedBuffer

ENTRIES: Final = 256  # of an engine's queue: one more than its `depth`

#: What an operation carries: its first item is called with the result (the bytes done, or minus an
#: errno) and the tag itself.
Tag: TypeAlias = tuple[Any, ...]
#: Called after some operations ended: there is room for others.
OnRoom: TypeAlias = Callable[[], None]


class Engine(ABC):
    """Operations on one file descriptor, each of which ends in one call of its tag's first item.

    That call comes from the loop, never from inside the methods here; one operation may follow from
    inside it. Else the caller begins one only while `in_flight` is below `depth`. But a single
    fdatasync always has a place: what it must follow may end when the engine is full.
    The caller lets the engine have a buffer until its operation ended. What was queued starts
    together, at the end of the turn at the latest; `rounds` counts these starts. Operations are
    numbered from 1 on; `tags` has those in flight, the oldest first.
    """

    depth: int
    in_flight: int = 0
    rounds: int = 0
    number: int = 0  # of the last operation
    tags: dict[int, Tag]

    @abstractmethod
    def read(self, buffer: AlignedBuffer, start: int, length: int, offset: int, tag: Tag) -> None:
        """Read `length` bytes at `offset` into `buffer`, from its byte `start` on."""

    @abstractmethod
    def write(
        self, buffer: AlignedBuffer, start: int, length: int, offset: int, flags: int, tag: Any
    ) -> None:
        """Write `length` bytes of `buffer`, from its byte `start` on; `flags` are RWF_*."""

    @abstractmethod
    def datasync(self, tag: Tag) -> None:
        """Make what was written durable, as fdatasync does."""

    @abstractmethod
    def allocate(self, mode: int, offset: int, length: int, tag: Tag) -> None:
        """Punch, zero or allocate a range as fallocate does; `mode` is FALLOC_FL_*."""

    @abstractmethod
    def will_need(self, offset: int, length: int, tag: Tag) -> None:
        """Start to bring a range into the page cache."""

    @abstractmethod
    def close(self) -> None:
        """Release everything. Nothing is in flight any more."""

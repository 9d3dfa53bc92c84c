"""Page-aligned buffers: O_DIRECT needs them, and the kernel may keep them past a call."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Final
from weakref import WeakSet

from backends.api import Holder
from reactor.protocol.wire import MAX_PAYLOAD

POOL_BYTES_MAX: Final = 2 * MAX_PAYLOAD  # per channel, in use and free together
FREE_BYTES_MAX: Final = 8 << 20  # per channel; what is freed above goes back to the system
PAGE_BITS: Final = 12  # buffers are powers of two, from one page on


class AlignedBuffer:
    """Memory of its own mapping: `view` for Python, `address` for the kernel."""

    __slots__ = ("_free", "_pool", "address", "size", "view")

    def __init__(self, pool: BufferPool, size: int, free: list[AlignedBuffer]) -> None:
        self._pool = pool
        self._free = free
        self.size = size
        # The mapping ends with its last view: what was lent stays valid, whoever closes first.
        self.view = memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))

    def release(self) -> None:
        """Give the buffer back to its pool; to be called once."""
        pool, size = self._pool, self.size
        if pool.free_bytes + size <= FREE_BYTES_MAX:
            pool.free_bytes += size
            self._free.append(self)
        else:
            pool.total_bytes -= size
        if pool.exhausted:
            pool.exhausted = False
            pool.on_room()

    def blocked(self, holder: Holder) -> None:
        """Let the pool ask `holder`, whose peer does not read, to give its buffers back."""
        if self._pool.exhausted:
            holder.give_back()
        else:
            self._pool.blocked.add(holder)


class BufferPool:
    """Buffers for one channel, at most `POOL_BYTES_MAX`, in use and free together.

    `on_room` is called when a buffer came back after one was refused.
    """

    def __init__(self, on_room: Callable[[], None]) -> None:
        self.on_room = on_room
        self.total_bytes = 0
        self.free_bytes = 0
        self.exhausted = False  # a buffer was refused, and none has come back since
        # A peer that does not read would keep what it was lent from all others for ever. Weak: a
        # holder is asked when it may have nothing left, but not kept.
        self.blocked: WeakSet[Holder] = WeakSet()
        # By the bits of the largest index into a buffer; all that fit a page share one list.
        page: list[AlignedBuffer] = []
        larger = range(PAGE_BITS, (MAX_PAYLOAD - 1).bit_length())
        self._free = [page] * (PAGE_BITS + 1) + [list[AlignedBuffer]() for _ in larger]

    def take(self, length: int) -> AlignedBuffer | None:
        """Return a buffer of at least `length` bytes, None when there is no room now.

        Raises OSError when the system has no memory and nothing is in use.
        """
        bits = (length - 1).bit_length()
        free = self._free[bits]
        if free:
            buffer = free.pop()
            self.free_bytes -= buffer.size
            return buffer
        size = 1 << max(PAGE_BITS, bits)
        if self.total_bytes + size > POOL_BYTES_MAX and not self._make_room(size):
            self.exhausted = True
            return None
        try:
            buffer = AlignedBuffer(self, size, free)
        except OSError:
            if self.total_bytes == self.free_bytes:
                raise
            self.exhausted = True  # what is in use comes back
            return None
        self.total_bytes += size
        return buffer

    def drop_free(self) -> None:
        """Give back to the system what is not in use."""
        for free in self._free:
            free.clear()
        self.total_bytes -= self.free_bytes
        self.free_bytes = 0

    def _make_room(self, size: int) -> bool:
        """Drop what is free, then ask for what peers that do not read hold, one by one."""
        self.drop_free()
        while self.total_bytes + size > POOL_BYTES_MAX and self.blocked:
            self.blocked.pop().give_back()
            self.drop_free()
        return self.total_bytes + size <= POOL_BYTES_MAX

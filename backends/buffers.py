"""Page-aligned buffers: O_DIRECT needs them, and the kernel may keep them past a call."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Final

from reactor.protocol.wire import MAX_PAYLOAD

POOL_BYTES_MAX: Final = 2 * MAX_PAYLOAD  # per channel, in use and free together
FREE_BYTES_MAX: Final = 8 << 20  # per channel; what is freed above goes back to the system
SMALLEST_ORDER: Final = 12  # buffers are powers of two, from one page on


class AlignedBuffer:
    """Memory of its own mapping: `view` for Python, `address` for the kernel."""

    __slots__ = ("_pool", "address", "order", "view")

    def __init__(self, pool: BufferPool, order: int) -> None:
        self._pool = pool
        self.order = order
        # The mapping ends with its last view: what was lent stays valid, whoever closes first.
        self.view = memoryview(mmap.mmap(-1, 1 << order, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.view))

    def release(self) -> None:
        """Give the buffer back to its pool; to be called once."""
        self._pool.put(self)


class BufferPool:
    """Buffers for one channel, at most `POOL_BYTES_MAX`; `on_put` hears of each that comes back."""

    def __init__(self, on_put: Callable[[], None]) -> None:
        self._on_put = on_put
        self._free: list[list[AlignedBuffer]] = [[] for _ in range(POOL_BYTES_MAX.bit_length())]
        self._free_bytes = 0
        self.used_bytes = 0

    def take(self, length: int) -> AlignedBuffer | None:
        """Return a buffer of at least `length` bytes, None when there is no room now."""
        order = max(SMALLEST_ORDER, (length - 1).bit_length())
        size = 1 << order
        if self._free[order]:
            self._free_bytes -= size
            buffer = self._free[order].pop()
        elif self.used_bytes + size > POOL_BYTES_MAX:
            return None
        else:
            if self.used_bytes + self._free_bytes + size > POOL_BYTES_MAX:
                self._drop_free()
            buffer = AlignedBuffer(self, order)
        self.used_bytes += size
        return buffer

    def put(self, buffer: AlignedBuffer) -> None:
        """Take a buffer back."""
        size = 1 << buffer.order
        self.used_bytes -= size
        if self._free_bytes + size <= FREE_BYTES_MAX:
            self._free_bytes += size
            self._free[buffer.order].append(buffer)
        self._on_put()

    def _drop_free(self) -> None:
        for free in self._free:
            free.clear()
        self._free_bytes = 0

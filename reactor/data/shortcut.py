"""The short way of plain reads and writes to a disk that is memory.

Without a tuple, a call and a struct of its own, a request takes 0.4 us of Python here and 0.8 by
`Channel.submit`. What is not plain is left to that.
"""

from __future__ import annotations

import errno
from typing import Final

from backends.api import CHUNK_SHIFT, MappedMemory
from reactor.data.counters import Counters
from reactor.data.outgoing import REPLY_BYTES, Outgoing
from reactor.protocol.export import Export
from reactor.protocol.transmission import HEADER_BYTES, REFUSED, REQUESTS_MAX, Receiver
from reactor.protocol.wire import MAX_PAYLOAD, PLAIN_READ, PLAIN_REPLY, PLAIN_REQUEST, PLAIN_WRITE

CHUNK: Final = 1 << CHUNK_SHIFT
# If less is still to come of a payload, copying it costs less than receiving in two places.
PLACED_MIN: Final = 16 << 10


class MemoryShortcut:
    """Answers requests of one connection in the bytes of a receiver, until `stop`.

    Of `receiver` it uses what places a payload.
    """

    def __init__(
        self,
        memory: MappedMemory,
        export: Export,
        outgoing: Outgoing,
        counters: Counters,
        receiver: Receiver,
    ) -> None:
        self._memory = memory
        self._export = export
        self._outgoing = outgoing
        self._counters = counters
        self._receiver = receiver
        self._placed: tuple[bytes, int] | None = None  # cookie and length of a write on its way
        self._stopped = False
        self._bits_place = slice(0)
        self._bits = b""  # that a write's cookie must have there, if any

    @property
    def placing(self) -> bool:
        """Whether a write is on its way into the memory."""
        return self._placed is not None

    def write_only(self, place: slice, bits: bytes) -> None:
        """Leave alone, from now on, writes without these bytes in that place of their cookie."""
        self._bits_place, self._bits = place, bits

    def stop(self) -> None:
        """Answer no more than the write that is on its way."""
        self._stopped = True

    def lose_place(self) -> bool:
        """Fail the write on its way: where it belongs there is no memory any more. False: none is.

        Another client has trimmed the place meanwhile, and /dev/shm is full.
        """
        if self._placed is None:
            return False
        cookie, length = self._placed
        self._placed = None
        number = int.from_bytes(cookie, "big")
        self._receiver.skip_rest((REFUSED | errno.ENOSPC, 0, number, 0, length, None))
        return True

    def answer(self, buffer: memoryview, begin: int, end: int) -> int:
        """Answer what is plain from `begin`, up to the first request that is not.

        Returns where that begins. A write that is cut off leaves what came of it, to the byte.
        """
        memory, export, outgoing = self._memory, self._export, self._outgoing
        data, backed, size = memory.data, memory.backed, export.size
        unaligned = export.block_size - 1
        plain_write = b"" if export.readonly else PLAIN_WRITE
        unpack, append = PLAIN_REQUEST.unpack_from, outgoing.buffers.append
        bits, place = self._bits, self._bits_place
        written: list[bytes] = []  # cookies
        reads = read_bytes = written_bytes = 0
        if self._placed is not None:
            cookie, written_bytes = self._placed
            written.append(cookie)
            self._placed = None
        last = end - HEADER_BYTES if not self._stopped else -1
        for _ in range(REQUESTS_MAX):
            if begin > last:
                break
            kind, cookie, offset, length = unpack(buffer, begin)
            stop = offset + length
            if (
                not 0 < length <= MAX_PAYLOAD
                or (offset | length) & unaligned
                or stop > size
                or not (
                    backed[offset >> CHUNK_SHIFT] and backed[(stop - 1) >> CHUNK_SHIFT]
                    if length <= CHUNK
                    else memory.is_backed(offset, stop)
                )
            ):
                break
            if kind == PLAIN_READ:
                begin += HEADER_BYTES
                append(PLAIN_REPLY + cookie)
                append(data[offset:stop])
                reads += 1
                read_bytes += length
            elif kind == plain_write and (not bits or cookie[place] == bits):
                payload = begin + HEADER_BYTES
                if payload + length > end:
                    if self._place(cookie, data[offset:stop], buffer[payload:end]):
                        begin = end
                    break
                begin = payload + length
                data[offset:stop] = buffer[payload:begin]
                written.append(cookie)
                written_bytes += length
            else:
                break
        counters = self._counters
        if written:
            # In one buffer: another piece for each costs as much as the rest of its reply.
            append(PLAIN_REPLY + PLAIN_REPLY.join(written))
            counters.writes += len(written)
            counters.written_bytes += written_bytes
        counters.reads += reads
        counters.read_bytes += read_bytes
        outgoing.waiting += (reads + len(written)) * REPLY_BYTES + read_bytes
        return begin

    def _place(self, cookie: bytes, memory: memoryview, came: memoryview) -> bool:
        """Have the rest of a payload received straight into `memory`; False: it is too short."""
        if len(memory) - len(came) < PLACED_MIN:
            return False
        memory[: len(came)] = came
        self._receiver.receive_into(memory[len(came) :])
        self._placed = cookie, len(memory)
        return True

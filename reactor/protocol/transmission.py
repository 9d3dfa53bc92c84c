"""The transmission phase without I/O: bytes to requests, and which of them to refuse."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeAlias

from reactor.errors import ProtocolError
from reactor.protocol.export import Export
from reactor.protocol.wire import (
    MAX_PAYLOAD,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REQUEST_MAGIC,
    REQUEST,
)

#: (command, command flags, cookie, offset, length, payload), the same as the backends' Request.
Request: TypeAlias = tuple[int, int, int, int, int, memoryview | None]

CAPACITY: Final = 2 << 20  # bytes of the buffer that requests are received into
IN_PLACE_MAX: Final = CAPACITY // 2  # bytes; a larger payload is received elsewhere
SPACE_MIN: Final = 256 << 10  # bytes offered to a receive, so that it may bring a batch
REQUESTS_MAX: Final = 1024  # requests in one batch
HEADER_BYTES: Final = REQUEST.size

#: Answers requests at the beginning of buffer[begin:end] at once; returns where it stopped.
Shortcut: TypeAlias = Callable[[memoryview, int, int], int]

#: A command with this bit is refused with the errno in the other bits; its payload is gone.
#: The wire has 16 bits for the command, so no client can send it.
REFUSED: Final = 1 << 16

COMMAND_NAMES: Final = {
    NBD_CMD_READ: "read",
    NBD_CMD_WRITE: "write",
    NBD_CMD_FLUSH: "flush",
    NBD_CMD_TRIM: "trim",
    NBD_CMD_CACHE: "cache",
    NBD_CMD_WRITE_ZEROES: "write zeroes",
}

_NEEDS: Final = {
    NBD_CMD_READ: 0,
    NBD_CMD_WRITE: 0,
    NBD_CMD_FLUSH: NBD_FLAG_SEND_FLUSH,
    NBD_CMD_TRIM: NBD_FLAG_SEND_TRIM,
    NBD_CMD_CACHE: NBD_FLAG_SEND_CACHE,
    NBD_CMD_WRITE_ZEROES: NBD_FLAG_SEND_WRITE_ZEROES,
}
_CHANGES: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})
_FILLS: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES})


def validate(request: Request, export: Export) -> int:
    """Return the errno with which `request` must be refused, 0 when `export` can serve it.

    NBD_CMD_DISC is no request to serve and must not come here.
    """
    command, flags, _cookie, offset, length, _payload = request
    if command & REFUSED:
        return command ^ REFUSED
    if command not in _NEEDS:
        return errno.EINVAL
    return _not_offered(command, flags, export) or _out_of_place(command, offset, length, export)


def _not_offered(command: int, flags: int, export: Export) -> int:
    if command in _CHANGES and export.readonly:
        return errno.EPERM
    if _NEEDS[command] & ~export.flags or flags & ~_flags_allowed(command, export.flags):
        return errno.EINVAL
    return 0


def _out_of_place(command: int, offset: int, length: int, export: Export) -> int:
    if command == NBD_CMD_FLUSH:
        return errno.EINVAL if offset or length else 0
    if (offset | length) & (export.block_size - 1):
        return errno.EINVAL
    if offset + length > export.size:  # Python's integers do not wrap around
        return errno.ENOSPC if command in _FILLS else errno.EINVAL
    if command == NBD_CMD_READ and length > export.maximum_payload:
        return errno.EOVERFLOW
    return 0


def _flags_allowed(command: int, capabilities: int) -> int:
    # proto.md: FUA is accepted on every command once it is advertised.
    allowed = NBD_CMD_FLAG_FUA if capabilities & NBD_FLAG_SEND_FUA else 0
    if command == NBD_CMD_WRITE_ZEROES:
        allowed |= NBD_CMD_FLAG_NO_HOLE
        if capabilities & NBD_FLAG_SEND_FAST_ZERO:
            allowed |= NBD_CMD_FLAG_FAST_ZERO
    return allowed


class Receiver:
    """Turns received bytes into requests, whatever the pieces they arrive in.

    Receive into `recv_spaces`, in their order, then tell `received` how much came. Payloads are
    views of the receiver's memory, valid until the next `recv_spaces`. What `shortcut` answers is
    not returned. `take_memory(length)` says whether a large payload may have memory; if not, there
    is `more`. Invariant: `0 <= begin <= end <= CAPACITY`, where `begin..end` is received and
    not yet parsed.
    """

    def __init__(self, export: Export, take_memory: Callable[[int], bool] | None = None) -> None:
        #: Set once the stream cannot be trusted; what came before it was handed out.
        self.error: ProtocolError | None = None
        #: Whether `received(0)` has more requests: beyond the `REQUESTS_MAX` of a batch, or one for
        #: whose payload there was no memory.
        self.more = False
        self.shortcut: Shortcut | None = None
        self._export = export
        self._take_memory = take_memory
        # Anonymous memory takes no room before it is used; a bytearray would be filled at once.
        self._mapping = mmap.mmap(-1, CAPACITY, flags=mmap.MAP_PRIVATE)
        self._buffer = memoryview(self._mapping)
        self._all = [self._buffer]
        self._begin = 0
        self._end = 0
        self._disconnected = False  # what comes after NBD_CMD_DISC is not read
        self._skip = 0  # bytes still to come of a payload that nobody wants
        self._large: memoryview | None = None  # what is still to come of a payload, elsewhere
        self._taken: memoryview | None = None  # the memory that it is received into, if ours
        self._given: memoryview | None = None  # the memory of the payload last handed out
        self._spare: memoryview | None = None  # memory that no payload needs any more
        self._header: Request | None = None  # of the payload that is still to come

    @property
    def within_request(self) -> bool:
        """Whether a request has begun and not ended."""
        return self._end > self._begin or self._skip > 0 or self._large is not None

    @property
    def receives_large(self) -> bool:
        """Whether a payload is being received into memory of its own."""
        return self._large is not None

    @property
    def arrived(self) -> int:
        """The bytes that have come of such a payload."""
        if self._large is None or self._taken is None:
            return 0
        return len(self._taken) - len(self._large)

    @property
    def memory_bytes(self) -> int:
        """The size of the memory of large payloads, with what is kept for the next."""
        kept = (self._spare, self._given, self._taken)
        return sum(len(memory) for memory in kept if memory is not None)

    def recv_spaces(self) -> list[memoryview]:
        """Return where to receive; it ends the life of all payloads handed out."""
        if self.error is not None:
            raise self.error
        assert not self.more, "requests are waiting in the buffer"
        if self._given is not None or self._large is None:
            # Kept while one large payload follows the other: fresh memory costs more than a copy.
            self._spare, self._given = self._given, None
        begin, end = self._begin, self._end
        if begin == end:
            self._begin = self._end = 0
            return self._all if self._large is None else [self._large, self._buffer]
        if CAPACITY - end < SPACE_MIN or CAPACITY - begin < HEADER_BYTES + IN_PLACE_MAX:
            self._buffer[: end - begin] = self._buffer[begin:end]
            self._begin, self._end = 0, end - begin
        return [self._buffer[self._end :]]

    def received(self, count: int) -> list[Request]:
        """Return the requests that are complete now that `count` more bytes came.

        Raises ProtocolError when the stream was lost in an earlier call.
        """
        if self.error is not None:
            raise self.error
        if self._disconnected:
            return []
        requests: list[Request] = []
        if self._large is not None:
            missing = len(self._large)
            if count < missing:
                self._large = self._large[count:]
                return requests
            count -= missing
            self._large = None
            self._taken, self._given = None, self._taken
            if self._header is not None:
                requests.append(self._take_header())
        self._end += count
        assert 0 <= self._begin <= self._end <= CAPACITY
        if self._skip:
            skipped = min(self._skip, self._end - self._begin)
            self._begin += skipped
            self._skip -= skipped
            if self._skip:
                return requests
            requests.append(self._take_header())
        if self.shortcut is not None and not requests:  # requests are done in their order
            self._begin = self.shortcut(self._buffer, self._begin, self._end)
        self._parse(requests)
        return requests

    def skip_rest(self, header: Request) -> None:
        """Skip what is still to come of a payload, then hand out `header`."""
        assert self._large is not None
        self._skip, self._large, self._header = len(self._large), None, header

    def _take_header(self) -> Request:
        header, self._header = self._header, None  # or its payload would never be let go
        assert header is not None
        return header

    def rest(self) -> None:
        """Give memory back until more is received; no payload that was handed out is needed."""
        self._given = self._spare = None
        if self._begin == self._end:
            with suppress(OSError):  # it is locked
                self._mapping.madvise(mmap.MADV_DONTNEED)

    def clear(self) -> None:
        """Let go of memory that is not its own; nothing is received any more."""
        self.shortcut = self._take_memory = self._large = None

    def receive_into(self, memory: memoryview) -> None:
        """Receive what comes next there: `shortcut` has taken the header, and will be called."""
        self._large, self._header = memory, None

    def _parse(self, requests: list[Request]) -> None:
        unpack, append, buffer = REQUEST.unpack_from, requests.append, self._buffer
        begin, end = self._begin, self._end
        last = end - HEADER_BYTES
        self.more = False
        for _ in range(REQUESTS_MAX):
            if begin > last:
                break
            magic, flags, command, cookie, offset, length = unpack(buffer, begin)
            if magic != NBD_REQUEST_MAGIC:
                self.error = ProtocolError(f"request with magic 0x{magic:08x}")
                break
            if command != NBD_CMD_WRITE:
                begin += HEADER_BYTES
                append((command, flags, cookie, offset, length, None))
                if command != NBD_CMD_DISC:
                    continue
                self._disconnected = True
                begin = end
                break
            payload = begin + HEADER_BYTES
            if payload + length <= end:
                begin = payload + length
                append((command, flags, cookie, offset, length, buffer[payload:begin]))
                continue
            if length > IN_PLACE_MAX:
                if self._begin_large((command, flags, cookie, offset, length, None), payload):
                    begin = end
                else:
                    self.more = True
            break
        else:
            self.more = begin <= last
        self._begin = begin

    def _begin_large(self, header: Request, payload: int) -> bool:
        """Take the header of a payload that does not fit the buffer, and what came of it.

        False: not now, for there is no memory.
        """
        command, flags, cookie, offset, length, _ = header
        if length > MAX_PAYLOAD:
            self.error = ProtocolError(f"write of {length} bytes, more than {MAX_PAYLOAD}")
            return True
        came = self._end - payload
        error = validate(header, self._export)
        if not error:
            spare = self._spare is not None and len(self._spare) >= length
            if not (spare or self._take_memory is None or self._take_memory(length)):
                return False
            try:
                memory = self._memory(length)
            except OSError:
                error = errno.ENOMEM
            else:
                memory[:came] = self._buffer[payload : self._end]
                self._large = memory[came:]
                self._header = (command, flags, cookie, offset, length, memory)
                return True
        self._header = (REFUSED | error, flags, cookie, offset, length, None)
        self._skip = length - came
        return True

    def _memory(self, length: int) -> memoryview:
        spare, self._spare = self._spare, None
        if spare is None or len(spare) < length:
            spare = memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE))
        self._taken = spare
        return spare[:length]

"""The bytes of the transmission phase, written by hand where a test needs them exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reactor.protocol.export import Export
from reactor.protocol.transmission import Receiver
from reactor.protocol.wire import (
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    REQUEST,
    SIMPLE_REPLY,
)

#: HAS_FLAGS, FLUSH, FUA, TRIM, WRITE_ZEROES, CACHE.
EVERYTHING = 1 | 4 | 8 | 32 | 64 | 1024
READ_ONLY = 2

#: A request as it is compared: the payload as bytes.
Plain = tuple[int, int, int, int, int, bytes | None]


def export(size: int = 1 << 20, block_size: int = 512, flags: int = EVERYTHING) -> Export:
    return Export("disk", "", size, block_size, flags)


def request(
    command: int,
    offset: int = 0,
    length: int = 0,
    *,
    cookie: int = 1,
    flags: int = 0,
    payload: bytes = b"",
) -> bytes:
    header = REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, offset, length or len(payload))
    return header + payload


def reply(cookie: int, error: int = 0, data: bytes = b"") -> bytes:
    return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie) + data


def replies(stream: bytes, reads: Mapping[int, int]) -> list[tuple[int, int, bytes]]:
    """Return (cookie, error, data) of each reply; `reads` has the length of each read's data."""
    found, position = [], 0
    while position < len(stream):
        magic, error, cookie = SIMPLE_REPLY.unpack_from(stream, position)
        assert magic == NBD_SIMPLE_REPLY_MAGIC
        position += SIMPLE_REPLY.size
        length = 0 if error else reads.get(cookie, 0)
        assert position + length <= len(stream)
        found.append((cookie, error, stream[position : position + length]))
        position += length
    return found


def feed(receiver: Receiver, pieces: Iterable[bytes]) -> list[Plain]:
    """Receive `pieces`, each as far as there is space for it, until the stream is lost."""
    found: list[Plain] = []
    for piece in pieces:
        left = memoryview(piece)
        while left and receiver.error is None:
            count = fill(receiver.recv_spaces(), left)
            assert count
            left = left[count:]
            found += plain(receiver.received(count))
            while receiver.more:
                found += plain(receiver.received(0))
    return found


def fill(spaces: list[memoryview], data: memoryview | bytes) -> int:
    """Put into `spaces` what they take of `data`, as a receive does; returns how much that was."""
    count = 0
    for space in spaces:
        piece = data[count : count + len(space)]
        space[: len(piece)] = piece
        count += len(piece)
    return count


def plain(received: list[tuple[int, int, int, int, int, memoryview | None]]) -> list[Plain]:
    """Copy the payloads, which are valid only until the next receive."""
    return [(*head, None if data is None else bytes(data)) for *head, data in received]  # type: ignore[misc]


def bytewise(data: bytes) -> list[bytes]:
    return [data[i : i + 1] for i in range(len(data))]

"""A disk as its users reach it: by its socket or by its kernel device."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
from collections.abc import Iterable
from itertools import islice
from typing import Final, Protocol

from reactor.errors import ProtocolError, ReactorError
from reactor.protocol.client import Negotiation, Transmission
from reactor.protocol.wire import NBD_CMD_DISC, NBD_CMD_FLUSH, NBD_CMD_READ, NBD_CMD_WRITE

LENGTH_MAX: Final = 128 << 10  # bytes of one request
DEPTH: Final = 32  # requests at a time over a socket
REPLY_SECONDS: Final = 30.0
RECEIVE_BYTES: Final = 1 << 20


class Disk(Protocol):
    """A disk that is reached as its users reach it."""

    depth: int

    def transfer(self, command: int, offsets: Iterable[int], length: int) -> int:
        """Write the pattern at `offsets`, or read and compare; returns how many were done."""

    def flush(self) -> None:
        """Make what was written durable."""

    def close(self) -> None:
        """Let go of the disk."""


class SocketDisk:
    """A disk behind a unix socket, by our own client."""

    depth = DEPTH

    def __init__(self, path: str, pattern: memoryview) -> None:
        self._pattern = pattern
        self._transmission = Transmission()
        self._cookie = 0
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(REPLY_SECONDS)
        self._sock.connect(path)
        negotiation = Negotiation()
        while negotiation.export is None:
            self._sock.sendall(negotiation.receive(self._receive()))

    def transfer(self, command: int, offsets: Iterable[int], length: int) -> int:
        waiting: dict[int, int] = {}
        remaining = iter(offsets)
        count = 0
        while True:
            self._send(command, islice(remaining, DEPTH - len(waiting)), length, waiting)
            if not waiting:
                return count
            for cookie, error, data in self._transmission.receive(self._receive()):
                if error:
                    raise OSError(error, os.strerror(error))
                offset = waiting.pop(cookie)
                if command == NBD_CMD_READ:
                    compare(data, self._pattern, offset)
                count += 1

    def flush(self) -> None:
        self.transfer(NBD_CMD_FLUSH, [0], 0)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # the peer may have gone first
            self._sock.sendall(self._transmission.request(NBD_CMD_DISC, 0))
        self._sock.close()

    def _send(
        self, command: int, offsets: Iterable[int], length: int, waiting: dict[int, int]
    ) -> None:
        parts: list[bytes | memoryview] = []
        for offset in offsets:
            self._cookie += 1
            waiting[self._cookie] = offset
            parts.append(self._transmission.request(command, self._cookie, offset, length))
            if command == NBD_CMD_WRITE:
                parts.append(self._pattern[offset : offset + length])
        self._sock.sendall(b"".join(parts))

    def _receive(self) -> bytes:
        data = self._sock.recv(RECEIVE_BYTES)
        if not data:
            raise ProtocolError("the service closed the connection")
        return data


class DeviceDisk:
    """A disk that the kernel shows as /dev/nbdN; O_DIRECT, so that every access reaches it."""

    depth = 1

    def __init__(self, path: str, pattern: memoryview) -> None:
        self._pattern = pattern
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
        self._buffer = mmap.mmap(-1, LENGTH_MAX)  # O_DIRECT wants aligned memory

    def transfer(self, command: int, offsets: Iterable[int], length: int) -> int:
        count = 0
        with memoryview(self._buffer) as whole, whole[:length] as buffer:
            for offset in offsets:
                if command == NBD_CMD_WRITE:
                    buffer[:] = self._pattern[offset : offset + length]
                    done = os.pwritev(self._fd, [buffer], offset)
                else:
                    done = os.preadv(self._fd, [buffer], offset)
                    compare(buffer, self._pattern, offset)
                if done != length:
                    raise ReactorError(f"{done} bytes of {length} done at offset {offset}")
                count += 1
        return count

    def flush(self) -> None:
        os.fsync(self._fd)

    def close(self) -> None:
        self._buffer.close()
        os.close(self._fd)


def compare(data: bytes | memoryview, pattern: memoryview, offset: int) -> None:
    """Raise ReactorError unless `data` is what was written at `offset`."""
    if data != pattern[offset : offset + len(data)]:
        raise ReactorError(f"the {len(data)} bytes at offset {offset} are not what was written")

"""A small blocking NBD client for tests."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Self, TypeAlias

from reactor.protocol.client import Negotiation, Transmission
from reactor.protocol.export import Export
from reactor.protocol.wire import (
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)

SECONDS = 20.0  # for each wait; tests fail rather than hang
RECEIVE_BYTES = 1 << 20

Address: TypeAlias = str | Path | tuple[str, int] | socket.socket


class Client:
    """One connection in its transmission phase. Failed requests raise OSError with their errno.

    `address` is a unix path, a (host, port) or a connected socket; with `negotiate=False` the
    socket is taken to be in the transmission phase already, as the kernel's are.
    """

    def __init__(self, address: Address, export: str = "", *, negotiate: bool = True) -> None:
        self.sock = connect(address)
        self.transmission = Transmission()
        self.export: Export | None = None
        self._cookies: Iterator[int] = count(1)
        self._finished: list[tuple[int, int, bytes]] = []
        if negotiate:
            try:
                self._negotiate(export)
            except BaseException:
                self.sock.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def size(self) -> int:
        """The size of the export in bytes."""
        assert self.export is not None
        return self.export.size

    def read(self, offset: int, length: int) -> bytes:
        return self.do(NBD_CMD_READ, offset, length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        flags = NBD_CMD_FLAG_FUA if fua else 0
        self.do(NBD_CMD_WRITE, offset, len(data), flags=flags, payload=data)

    def flush(self) -> None:
        self.do(NBD_CMD_FLUSH)

    def trim(self, offset: int, length: int) -> None:
        self.do(NBD_CMD_TRIM, offset, length)

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        flags = NBD_CMD_FLAG_NO_HOLE if no_hole else 0
        self.do(NBD_CMD_WRITE_ZEROES, offset, length, flags=flags)

    def cache(self, offset: int, length: int) -> None:
        self.do(NBD_CMD_CACHE, offset, length)

    def do(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> bytes:
        """Do one request, whatever it is; nothing else may be outstanding."""
        self.submit(command, offset, length, flags=flags, payload=payload)
        ((_cookie, error, data),) = self.finish(1)
        if error:
            raise OSError(error, os.strerror(error))
        return data

    def submit(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        *,
        flags: int = 0,
        payload: bytes = b"",
    ) -> int:
        """Send one request without waiting for its reply; returns its cookie."""
        cookie = next(self._cookies)
        self.send(self.transmission.request(command, cookie, offset, length, flags=flags))
        if payload:
            self.send(payload)
        return cookie

    def finish(self, replies: int) -> list[tuple[int, int, bytes]]:
        """Wait for so many replies: (cookie, error, data). ECONNRESET when the stream ends."""
        while len(self._finished) < replies:
            self._finished += self.transmission.receive(self._receive())
        finished, self._finished = self._finished[:replies], self._finished[replies:]
        return finished

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self.sock.sendall(data)

    def at_end(self) -> bool:
        """Wait for the server to end the stream; False when it sends something instead."""
        try:
            return not self.sock.recv(1)
        except ConnectionError:
            return True

    def disconnect(self) -> None:
        """Say CMD_DISC, wait until the server has closed, close."""
        self.submit(NBD_CMD_DISC)
        assert self.at_end()
        self.close()

    def close(self) -> None:
        """Close without a word."""
        self.sock.close()

    def _negotiate(self, name: str) -> None:
        negotiation = Negotiation(name)
        while negotiation.export is None:
            self.send(negotiation.receive(self._receive()))
        self.export = negotiation.export
        assert not negotiation.trailing

    def _receive(self) -> bytes:
        data = self.sock.recv(RECEIVE_BYTES)
        if not data:
            raise OSError(errno.ECONNRESET, "the server ended the stream")
        return data


def connect(address: Address) -> socket.socket:
    """Connect to a unix path or (host, port); a socket is taken as it is."""
    if isinstance(address, socket.socket):
        sock = address
    elif isinstance(address, tuple):
        sock = socket.create_connection(address, timeout=SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(SECONDS)
        try:
            sock.connect(os.fspath(address))
        except OSError:
            sock.close()
            raise
    sock.settimeout(SECONDS)
    return sock

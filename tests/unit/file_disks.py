"""Disks of the file backend, opened for tests."""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.api import Event
from backends.engine import Engine
from backends.file import FileBackend, FileDisk
from backends.filechannel import FileChannel, open_engine
from reactor.data.connection import Connection
from reactor.errors import reason
from reactor.loop import Reactor
from reactor.protocol.wire import NBD_CMD_READ
from tests.submitting import Requester, turn_until
from tests.unit.requests import export, request

MIB = 1 << 20
UNCACHE_SECONDS = 10.0


def uncache(path: Path) -> None:
    """Have the page cache let go of a file; it does not always do so at once."""
    deadline = time.monotonic() + UNCACHE_SECONDS
    with path.open("rb") as file:
        while True:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if not cached_pages(file.fileno()):
                return
            assert time.monotonic() < deadline
            time.sleep(0.01)


def cached_pages(descriptor: int) -> int:
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None).mincore(ctypes.byref(start), ctypes.c_size_t(len(mapped)), pages)
        del start  # or the mapping could not be closed
        assert not failed
        return sum(page & 1 for page in pages)


class Opened:
    """A disk with a channel and a requester."""

    def __init__(
        self,
        path: Path,
        *,
        engine: Callable[..., Engine] = open_engine,
        block_size: int | None = None,
        readonly: bool = False,
        shared: bool = False,
        name: str = "disk",
        keep_lent: bool = False,
        **options: object,
    ) -> None:
        self.path = path
        self.reactor = Reactor("interrupt")
        self.events: list[tuple[Event, str]] = []
        try:
            disk = FileBackend.create(
                name,
                {"path": str(path), **options},
                instance="test",
                reactor=self.reactor,
                block_size=block_size,
                readonly=readonly,
                shared=shared,
            )
        except BaseException:
            self.reactor.close()
            raise
        assert isinstance(disk, FileDisk)
        self.disk = disk
        self.descriptor = disk.open(lambda *event: self.events.append(event), write=not readonly)
        self.channel = FileChannel(disk, self.reactor, engine)
        self.requester = Requester(self.reactor, self.channel, keep_lent=keep_lent)

    def close(self) -> None:
        self.channel.close()
        self.descriptor.close()
        self.disk.close()
        self.reactor.close()

    def removal(self) -> str:
        turn_until(self.reactor, lambda: self.events)
        ((event, text),) = self.events
        assert event is Event.REMOVE
        return text


class Client:
    """A client of a channel that others use too."""

    def __init__(self, disk: Opened) -> None:
        self._reactor = disk.reactor
        self._socket, served = socket.socketpair()
        self._socket.setblocking(False)
        self._received = bytearray()
        self.closed: list[str] = []
        self.connection = Connection(
            *(disk.reactor, served, export(size=disk.disk.size), disk.channel),
            lambda _, why: self.closed.append(why),
        )

    def ask(self, *reads: tuple[int, int]) -> None:
        for cookie, (offset, length) in enumerate(reads):
            self._socket.sendall(request(NBD_CMD_READ, offset, length, cookie=cookie))

    def answers(self, count: int) -> bytes:
        """Return the next `count` bytes, which must come."""
        turn_until(self._reactor, lambda: self.take() >= count)
        received, self._received = bytes(self._received[:count]), self._received[count:]
        return received

    def end(self) -> None:
        self._socket.close()
        turn_until(self._reactor, lambda: self.closed)

    def take(self) -> int:
        """Take what came; returns how much has come and was not returned."""
        try:
            while data := self._socket.recv(MIB):
                self._received += data
        except BlockingIOError:
            pass
        return len(self._received)


Open = Callable[..., Opened]


def opening() -> Iterator[Open]:
    """Yield a function that opens disks, then close them all."""
    everything: list[Opened] = []

    def open_one(path: Path, **options: object) -> Opened:
        everything.append(Opened(path, **options))  # type: ignore[arg-type]
        return everything[-1]

    yield open_one
    for one in everything:
        one.close()


def problem(opened: Open, path: Path, **options: object) -> tuple[int | None, str]:
    """Open what cannot be opened; returns the errno and what the operator is told."""
    with pytest.raises(OSError) as raised:  # noqa: PT011
        opened(path, **options)
    text = reason(raised.value)
    assert text.startswith(f"{path}: ")
    return raised.value.errno, text.removeprefix(f"{path}: ")

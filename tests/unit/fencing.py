"""Fenced connections of several workers to one file, their loops turned by hand."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from backends.lanes import LaneLocks
from reactor.data.fence import YIELD_SECONDS, Lanes
from reactor.loop import Reactor
from reactor.protocol.wire import NBD_CMD_WRITE
from tests.unit.pumping import HeldChannel, Pump, null_disk
from tests.unit.requests import request

LANE, OTHER = 0, 3
WHILE_SECONDS = 5 * YIELD_SECONDS  # in which what may happen, happens


def handle(lane: int, tag: int = 1, sent: int = 1, order: str = sys.byteorder) -> int:
    """Return a handle of the driver, read from the wire as big endian."""
    number = sent << 32 | lane << 16 | tag
    return int.from_bytes(number.to_bytes(8, "big" if order == "big" else "little"), "big")


def write(lane: int, tag: int = 1, sent: int = 1) -> bytes:
    return request(
        NBD_CMD_WRITE, 512 * tag, cookie=handle(lane, tag, sent), payload=bytes([sent]) * 512
    )


class Bed:
    """Workers, each with its own open of one file; their loops turn together."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pumps: list[Pump] = []
        self.stack = ExitStack()
        self.reactor = Reactor("poll")
        self.stack.callback(self.reactor.close)

    def open(self) -> Lanes:
        """Open the file as a worker does."""
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT)
        self.stack.callback(os.close, fd)
        return self.lanes(fd)

    def lanes(self, fd: int | None) -> Lanes:
        return Lanes(fd, self.reactor, "disk")

    def locks(self, fd: int | None) -> LaneLocks:
        return LaneLocks(fd, self.reactor, "disk")

    def worker(self, room: int = 1 << 30) -> tuple[Pump, HeldChannel]:
        """Serve a connection in a worker of its own."""
        return self.connection(self.open(), room)

    def connection(self, lanes: Lanes, room: int = 1 << 30) -> tuple[Pump, HeldChannel]:
        held = HeldChannel(null_disk(), room)
        pump = self.stack.enter_context(Pump(held, lanes=lanes))
        self.pumps.append(pump)
        return pump, held

    def turn(self) -> None:
        self.reactor.turn()
        for pump in self.pumps:
            pump.reactor.turn()

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline
            self.turn()

    def a_while(self) -> None:
        """Let everything happen that may."""
        deadline = time.monotonic() + WHILE_SECONDS
        while time.monotonic() < deadline:
            self.turn()


def shut(pump: Pump) -> None:
    """Do what the kernel does to a connection before it sends elsewhere."""
    pump.client.shutdown(socket.SHUT_RDWR)

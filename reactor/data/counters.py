"""What is counted of a connection."""

from __future__ import annotations

from typing import Final

from reactor.protocol.wire import (
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)

#: Those that are reported.
COUNTERS: Final = (
    "reads",
    "read_bytes",
    "writes",
    "written_bytes",
    "flushes",
    "trims",
    "trimmed_bytes",
    "zeroes",
    "errors",
    "receives",
    "sends",
)


class Counters:
    """Requests that were done, by command, and what they took."""

    __slots__ = (*COUNTERS, "bugs")

    def __init__(self) -> None:
        self.reads = self.read_bytes = self.writes = self.written_bytes = 0
        self.flushes = self.trims = self.trimmed_bytes = self.zeroes = 0
        self.errors = 0  # requests refused or failed
        self.bugs = 0  # of those, failed by an exception that no backend may raise
        self.receives = self.sends = 0  # system calls

    def done(self, command: int, length: int) -> None:
        """Count a request."""
        if command == NBD_CMD_READ:
            self.reads += 1
            self.read_bytes += length
        elif command == NBD_CMD_WRITE:
            self.writes += 1
            self.written_bytes += length
        elif command == NBD_CMD_FLUSH:
            self.flushes += 1
        elif command == NBD_CMD_TRIM:
            self.trims += 1
            self.trimmed_bytes += length
        elif command == NBD_CMD_WRITE_ZEROES:
            self.zeroes += 1

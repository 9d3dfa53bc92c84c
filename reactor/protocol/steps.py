"""Feeds a parser that is written as a generator, whatever pieces its input comes in."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from typing import TypeAlias

#: Yields how many bytes it wants next (0 is legal) and is sent exactly these.
Parser: TypeAlias = Generator[int, bytes, None]


class Steps:
    """Runs `parser` over a stream. What it raises ends it; what it did not want stays in `rest`."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser
        self._wanted = next(parser)
        self._received = bytearray()
        self.done = False

    @property
    def rest(self) -> bytes:
        """The bytes after those that the parser took."""
        return bytes(self._received)

    def feed(self, data: bytes) -> None:
        """Give the parser all that it wants of what has come so far."""
        self._received += data
        while not self.done and len(self._received) >= self._wanted:
            with memoryview(self._received) as view:
                piece = bytes(view[: self._wanted])
            del self._received[: self._wanted]
            self.done = True  # unless the parser goes on, below
            with suppress(StopIteration):
                self._wanted = self._parser.send(piece)
                self.done = False

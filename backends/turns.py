"""What a worker does at once in one turn of its loop, so that no disk waits long for another."""

from __future__ import annotations

from typing import Final

from backends.api import Channel

TURN_BYTES: Final = 4 << 20  # copied, made or cleared, about: a millisecond
#: The channels of this worker that share a turn: their owners wait for the next.
SHARING: Final[set[Channel]] = set()

"""What a worker does at once in one turn of its loop, so that no disk waits long for another."""

from __future__ import annotations

from typing import Final

from backends.api import Channel

#: Copied, made or cleared for a disk, about: a millisecond. Those whose owners wait share it.
TURN_BYTES: Final = 4 << 20
#: The channels of this worker whose owners wait for the next turn.
SHARING: Final[set[Channel]] = set()

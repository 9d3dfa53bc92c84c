"""What the demonstration does to a disk, and what it measures."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Final

from reactor.demo.disks import LENGTH_MAX, Disk
from reactor.protocol.wire import NBD_CMD_READ, NBD_CMD_WRITE

AREA_BYTES: Final = 32 << 20  # what is written and read back
SMALL_BYTES: Final = 4 << 10
SECONDS: Final = 1.0  # each random phase


def exercise(disk: Disk) -> Iterator[str]:
    """Write, read back and compare; yields one line about each phase."""
    for title, command, length, mixed in (
        ("sequential writes", NBD_CMD_WRITE, LENGTH_MAX, False),
        ("random writes", NBD_CMD_WRITE, SMALL_BYTES, True),
        ("random reads", NBD_CMD_READ, SMALL_BYTES, True),
        ("sequential reads", NBD_CMD_READ, LENGTH_MAX, False),
    ):
        began = time.monotonic()
        offsets = at_random(began + SECONDS, length) if mixed else range(0, AREA_BYTES, length)
        count = disk.transfer(command, offsets, length)
        if command == NBD_CMD_WRITE:
            disk.flush()
        seconds = time.monotonic() - began
        yield (
            f"{length >> 10:>5} KiB {title:<17} {disk.depth:>3} at a time "
            f"{count / seconds:>9,.0f} IOPS {count * length / seconds / 1e6:>8,.1f} MB/s"
        )


def at_random(deadline: float, length: int) -> Iterator[int]:
    """Yield offsets until `deadline`."""
    blocks = AREA_BYTES // length
    while time.monotonic() < deadline:
        yield random.randrange(blocks) * length

"""Usage: memory_hog.py MIB: fills so much memory, then checks that it keeps what it holds.

The kernel does the copying, through a pipe: a page fault costs the kernel much less than it costs
a process in User-Mode Linux.
"""

from __future__ import annotations

import mmap
import os
import random
import sys

PIECE = 64 << 10  # bytes; what a pipe takes

memory = memoryview(mmap.mmap(-1, int(sys.argv[1]) << 20, flags=mmap.MAP_PRIVATE))
pieces = [memory[begin : begin + PIECE] for begin in range(0, len(memory), PIECE)]
pattern = random.Random(1).randbytes(PIECE - 8)
read_end, write_end = os.pipe()

for number, piece in enumerate(pieces):
    os.write(write_end, number.to_bytes(8, "little") + pattern)
    os.readv(read_end, [piece])
for number, piece in enumerate(pieces):
    os.write(write_end, piece)
    if os.read(read_end, PIECE) != number.to_bytes(8, "little") + pattern:
        sys.exit(f"the memory changed at {number * PIECE}")

"""What a process does for a host that is short of memory."""

from __future__ import annotations

import sys

from tests.commands import run

MIB = 1 << 20
#: Prints the bytes that it occupies after it has freed many small pieces below one that it keeps.
FREED = """\
import re
from pathlib import Path
from reactor import pressure

pieces = [bytes(4096) for _ in range(64 << 8)]
kept = bytes(4096)
del pieces
pressure.give_back_heap()
print(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_what_was_freed_is_given_back() -> None:
    kib = run(sys.executable, "-c", FREED)
    assert int(kib) << 10 < 32 * MIB

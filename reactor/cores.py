"""Lists of CPU cores as people write them: `0-3`, `0,2,4-7`, `0x0f` or `all`."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from itertools import groupby
from typing import Final

from reactor.errors import quoted

TEXT_MAX: Final = 4096  # characters: every second one of a thousand cores

_PART: Final = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)
_MASK: Final = re.compile(r"0x[0-9a-f]+", re.ASCII | re.IGNORECASE)


def parse_cores(text: str, usable: Collection[int] | None = None) -> tuple[int, ...]:
    """Return the cores that `text` lists, sorted, each once; raises ValueError that says why not.

    `usable` are the cores that this process may run on (default: as the kernel says).
    """
    if usable is None:
        usable = os.sched_getaffinity(0)
    if text == "all":
        return tuple(sorted(usable))
    if len(text) > TEXT_MAX:
        raise ValueError(f"a list of cores is not longer than {TEXT_MAX} characters")
    listed = _in_mask(int(text, 16)) if _MASK.fullmatch(text) else _in_list(text)
    cores = set()
    for core in listed:  # a range may be huge; the first core that is not there ends it
        if core not in usable:
            raise ValueError(_why_not(core, usable))
        cores.add(core)
    if not cores:
        raise ValueError(f"{text} lists no core")
    return tuple(sorted(cores))


def format_cores(cores: Collection[int]) -> str:
    """Return `cores` as a list of ranges, which `parse_cores` reads back."""
    runs = groupby(enumerate(sorted(cores)), key=lambda pair: pair[1] - pair[0])
    ranges = ([core for _, core in run] for _, run in runs)
    return ",".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else f"{r[0]}" for r in ranges)


def _in_mask(mask: int) -> Iterator[int]:
    return (core for core in range(mask.bit_length()) if mask >> core & 1)


def _in_list(text: str) -> Iterator[int]:
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise ValueError(
                f"{quoted(text)} is not a list of cores; write 0-3, 0,2,4-7, 0x0f or all"
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part.strip()} runs backwards; write {last}-{first}")
        yield from range(first, last + 1)


def _why_not(core: int, usable: Collection[int]) -> str:
    present = os.sysconf("SC_NPROCESSORS_CONF")
    if core >= present:
        return f"core {core} does not exist (this machine has {format_cores(range(present))})"
    return f"core {core} is not allowed for this process (it may run on {format_cores(usable)})"

"""What a process has open."""

from __future__ import annotations

import itertools
from pathlib import Path


def limit_for(pid: int, spare: int) -> int:
    """Return the RLIMIT_NOFILE with which a process can open so many files more."""
    used = {int(descriptor.name) for descriptor in Path(f"/proc/{pid}/fd").iterdir()}
    free = (number for number in itertools.count() if number not in used)
    return next(itertools.islice(free, spare, None))


def open_files(pid: int | str = "self") -> list[str]:
    """Return what each descriptor of a process is open on."""
    targets = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(str(descriptor.readlink()))
        except FileNotFoundError:  # it was closed meanwhile
            continue
    return targets

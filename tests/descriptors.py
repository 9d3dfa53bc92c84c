"""What a process has open."""

from __future__ import annotations

from pathlib import Path


def open_files(pid: int | str = "self") -> list[str]:
    """Return what each descriptor of a process is open on."""
    targets = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(str(descriptor.readlink()))
        except FileNotFoundError:  # it was closed meanwhile
            continue
    return targets

"""Devices in use as operators use them: below file systems, and to swap to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.commands import run


@contextmanager
def mounted(device: str | Path, folder: Path, *options: str) -> Iterator[Path]:
    """Mount the file system on `device`."""
    folder.mkdir(exist_ok=True)
    run("mount", *options, str(device), str(folder))
    try:
        yield folder
    finally:
        run("umount", str(folder))


@contextmanager
def mounted_new(device: str | Path, folder: Path) -> Iterator[Path]:
    """Make an ext4 file system on `device`, and mount it."""
    run("mkfs.ext4", "-q", str(device))
    with mounted(device, folder):
        yield folder


@contextmanager
def swapped_to(device: str | Path) -> Iterator[None]:
    """Have the kernel swap to `device`."""
    run("mkswap", str(device))
    run("swapon", str(device))
    try:
        yield
    finally:
        run("swapoff", str(device))

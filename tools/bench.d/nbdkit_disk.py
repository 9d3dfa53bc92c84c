"""A memory disk for nbdkit's Python plugin: what python_disk is for nbd-reactor."""

from __future__ import annotations

API_VERSION = 2
disk = memoryview(b"")


def config(key: str, value: str) -> None:
    """Take `bytes=SIZE`."""
    global disk  # noqa: PLW0603 - nbdkit has one namespace for a plugin's state
    disk = memoryview(bytearray(int(value)))


def open(readonly: bool) -> None:  # noqa: A001 - nbdkit's name
    """Begin a connection."""


def get_size(_handle: None) -> int:
    """Return the bytes."""
    return len(disk)


def pread(_handle: None, buffer: bytearray, offset: int, _flags: int) -> None:
    """Fill `buffer`."""
    buffer[:] = disk[offset : offset + len(buffer)]


def pwrite(_handle: None, buffer: memoryview, offset: int, _flags: int) -> None:
    """Store `buffer`."""
    disk[offset : offset + len(buffer)] = buffer


def flush(_handle: None, _flags: int) -> None:
    """Memory is as durable as it gets."""

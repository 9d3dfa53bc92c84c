"""Memory of a disk that must be there: it is not made anew."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.sharedmemory import SharedMemory, shared_memory

MIB = 1 << 20


@pytest.fixture
def path() -> Iterator[Path]:
    path = shared_memory("lost", f"test-{os.getpid()}")
    yield path
    path.unlink(missing_ok=True)


def test_memory_that_is_gone_is_not_made_anew(path: Path) -> None:
    with pytest.raises(OSError, match=r"memory .* is gone, and had at least 4096") as caught:
        SharedMemory(path, b"disk", MIB, shared=False, least=4096)
    assert caught.value.errno == errno.ENOENT
    assert not path.exists()
    path.touch()  # its maker died before it was a disk
    with pytest.raises(OSError, match="has only 0 bytes, and had at least 4096"):
        SharedMemory(path, b"disk", MIB, shared=False, least=4096)
    assert path.exists()


def test_memory_that_is_there_may_grow(path: Path) -> None:
    SharedMemory(path, b"disk", MIB, shared=False).close()
    with pytest.raises(OSError, match="has only 1048576 bytes"):
        SharedMemory(path, b"disk", 2 * MIB, shared=False, least=2 * MIB)
    memory = SharedMemory(path, b"disk", 2 * MIB, shared=False, least=MIB)
    assert len(memory.data) == 2 * MIB
    memory.close()

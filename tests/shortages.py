"""Take descriptors or memory from a running process for a while."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path


@contextmanager
def limited(pid: int, limit: int, value: int) -> Iterator[None]:
    """Lower a soft limit of a process."""
    before, most = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (value, most))
    try:
        yield
    finally:
        resource.prlimit(pid, limit, (before, most))


def few_descriptors(pid: int, spare: int) -> AbstractContextManager[None]:
    """Let a process open only so many files more."""
    listed = list(Path(f"/proc/{pid}/fd").iterdir())  # with that of the listing, if it is ours
    used = {int(descriptor.name) for descriptor in listed if descriptor.is_symlink()}
    free = (number for number in itertools.count() if number not in used)
    return limited(pid, resource.RLIMIT_NOFILE, next(itertools.islice(free, spare, None)))


def little_memory(pid: int, spare: int) -> AbstractContextManager[None]:
    """Let a process map only so many bytes more."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
    return limited(pid, resource.RLIMIT_AS, pages * resource.getpagesize() + spare)

"""Placement: which core's worker owns a disk. Pure."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Iterable, Sequence

from reactor.spec import DiskSpec


def place(spec: DiskSpec, placed: Iterable[tuple[DiskSpec, int]], cores: Sequence[int]) -> int:
    """Return the core for `spec` beside the disks already `placed`.

    Disks that share a listener share its worker; else the disk's own `core`, else the core with
    the fewest disks. Raises OSError EINVAL when these contradict each other.
    """
    load: Counter[int] = Counter()
    shared: dict[int, str] = {}
    for other, core in placed:
        load[core] += 1
        for address in set(spec.listen) & set(other.listen):
            shared[core] = f"{address} is served by core {core} for disk {other.name}"
    if spec.core is not None and spec.core not in cores:
        raise OSError(errno.EINVAL, f"disk {spec.name}: no worker runs on core {spec.core}")
    wanted = set(shared) | ({spec.core} if spec.core is not None else set())
    if len(wanted) > 1:
        raise OSError(
            errno.EINVAL,
            f"disk {spec.name}: {'; '.join(shared.values())}"
            + (f"; core {spec.core} was asked for" if spec.core is not None else ""),
        )
    if wanted:
        return wanted.pop()
    return min(cores, key=lambda core: (load[core], core))


def place_all(specs: Sequence[DiskSpec], cores: Sequence[int]) -> dict[str, int]:
    """Return the core of every disk: those that name a core first, so the others fill up."""
    placed: list[tuple[DiskSpec, int]] = []
    for spec in sorted(specs, key=lambda spec: spec.core is None):
        placed.append((spec, place(spec, placed, cores)))
    return {spec.name: core for spec, core in placed}

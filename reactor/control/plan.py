"""Placement: which cores' workers serve a disk. Pure."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle

from reactor.spec import DiskSpec


@dataclass(frozen=True, slots=True)
class Placement:
    """`core` owns the disk and serves its listeners; `connections` has the core of each socket."""

    core: int
    connections: tuple[int, ...]

    @property
    def cores(self) -> tuple[int, ...]:
        """Every core that takes part, the owner first."""
        return (self.core, *sorted(set(self.connections) - {self.core}))


@dataclass(frozen=True, slots=True)
class Machine:
    """Where disks can be placed."""

    cores: Sequence[int]  # those with a worker
    cpus: int  # all that the kernel sends from
    can_share: Callable[[str], bool]  # whether several workers may serve a disk of the backend


def place(
    spec: DiskSpec, placed: Iterable[tuple[DiskSpec, Placement]], machine: Machine
) -> Placement:
    """Return the place for `spec` beside the disks already `placed`.

    Disks that share a listener share their owner; else it is the disk's own `core`, else the core
    with the fewest disks. Raises OSError EINVAL when these contradict each other.
    """
    cores = machine.cores
    load: Counter[int] = Counter()
    shared: dict[int, str] = {}
    for other, placement in placed:
        load.update(placement.cores)
        core = placement.core
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
    connections = min(spec.connections, machine.cpus)  # more would carry nothing
    spread = connections > 1 and machine.can_share(spec.backend)
    near = [core for core in cores if core < connections] if spread else []
    owner = wanted.pop() if wanted else min(near or cores, key=lambda core: (load[core], core))
    return Placement(
        owner, _spread(owner, connections, cores) if spread else (owner,) * connections
    )


def place_all(
    specs: Sequence[DiskSpec], placed: Iterable[tuple[DiskSpec, Placement]], machine: Machine
) -> dict[str, Placement]:
    """Return the place of every disk; those of that name that are `placed` stay.

    Those that name a core come first, so that the others fill up.
    """
    known = list(placed)
    places = {spec.name: placement for spec, placement in known}
    for spec in sorted(specs, key=lambda spec: spec.core is None):
        if spec.name not in places:
            places[spec.name] = place(spec, known, machine)
            known.append((spec, places[spec.name]))
    return places


def _spread(owner: int, connections: int, cores: Sequence[int]) -> tuple[int, ...]:
    """Return the core of each connection: i for connection i, as the kernel sends from CPU i."""
    first = cores.index(owner)
    others = cycle((*cores[first:], *cores[:first]))
    spread = [core if core in cores else next(others) for core in range(connections)]
    if owner not in spread:
        spread[-1] = owner
    return tuple(spread)

"""Placement: which cores' workers serve a disk. Pure."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import TypeAlias

from reactor.spec import Address, DiskSpec


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


PlaceOne: TypeAlias = Callable[[DiskSpec, Iterable[tuple[DiskSpec, Placement]], Machine], Placement]


def place(
    spec: DiskSpec, placed: Iterable[tuple[DiskSpec, Placement]], machine: Machine
) -> Placement:
    """Return the place for `spec` beside the disks already `placed`.

    Disks that share a listener share their owner; else it is the disk's own `core`, else the core
    with the fewest disks. Raises OSError EINVAL when these contradict each other.
    """
    return place_together([spec], list(placed), machine)[spec.name]


def place_anyhow(
    spec: DiskSpec, placed: Iterable[tuple[DiskSpec, Placement]], machine: Machine
) -> Placement:
    """Return the place for `spec` also if the others have its addresses where it cannot be.

    It finds them in use then, until all disks are placed together.
    """
    placed = list(placed)
    try:
        return place(spec, placed, machine)
    except OSError:
        return place(replace(fitting(spec, machine), listen=()), placed, machine)


def fitting(spec: DiskSpec, machine: Machine) -> DiskSpec:
    """Return `spec` without the core that it names if there is no worker on it."""
    return spec if spec.core in (None, *machine.cores) else replace(spec, core=None)


def fits(spec: DiskSpec, placement: Placement, machine: Machine) -> bool:
    """Whether a disk can stay where it is."""
    connections, spread = _width(spec, machine)
    return (
        all(core in machine.cores for core in placement.cores)
        and spec.core in (None, placement.core)
        and len(placement.connections) == connections
        and (spread or placement.cores == (placement.core,))
    )


def place_all(
    specs: Sequence[DiskSpec],
    placed: Iterable[tuple[DiskSpec, Placement]],
    machine: Machine,
    place_one: PlaceOne = place,
) -> dict[str, Placement]:
    """Return the place of every disk; those of that name that are `placed` stay.

    Those that name a core come first, so that the others fill up. Raises what `place_one` does.
    """
    known = list(placed)
    places = {spec.name: placement for spec, placement in known}
    for spec in sorted(specs, key=lambda spec: spec.core is None):
        if spec.name not in places:
            places[spec.name] = place_one(spec, known, machine)
            known.append((spec, places[spec.name]))
    return places


def place_together(
    specs: Sequence[DiskSpec], placed: Collection[tuple[DiskSpec, Placement]], machine: Machine
) -> dict[str, Placement]:
    """Return the places of all disks as `specs` want them, beside others that are `placed`.

    Those of `specs` that are placed stay where they are, unless their `core`, or that of a disk
    with one of their addresses, is another: a disk that is as it was goes last. Disks that are
    bound to a core come first, so that the others fill up. Raises OSError EINVAL when these
    contradict each other.
    """
    named = {spec.name for spec in specs}
    stay = {spec.name: (spec, placement) for spec, placement in placed}
    fixed = [(spec, placement) for spec, placement in placed if spec.name not in named]
    places = {spec.name: placement for spec, placement in fixed}
    load: Counter[int] = Counter()
    for placement in places.values():
        load.update(placement.cores)
    free: list[list[DiskSpec]] = []

    def settle(group: Sequence[DiskSpec], owner: int) -> None:
        for spec in group:
            _, place = stay.get(spec.name, (spec, None))
            if place is None or place.core != owner or not fits(spec, place, machine):
                place = _owned(spec, owner, machine)
            places[spec.name] = place
            load.update(place.cores)

    for group in _groups(specs):
        owner = _bound_to(group, fixed, stay, machine)
        if owner is None:
            free.append(group)
        else:
            settle(group, owner)
    for group in free:
        settle(group, _least_loaded(group[0], load, machine))
    return places


def _bound_to(
    group: Sequence[DiskSpec],
    fixed: Iterable[tuple[DiskSpec, Placement]],
    stay: Mapping[str, tuple[DiskSpec, Placement]],
    machine: Machine,
) -> int | None:
    """Return the core for disks that must have one and the same, None if any will do."""
    why: dict[int, str] = {}
    for spec in group:
        if spec.core is not None:
            if spec.core not in machine.cores:
                raise OSError(errno.EINVAL, f"disk {spec.name}: no worker runs on core {spec.core}")
            why[spec.core] = f"disk {spec.name} is to be on core {spec.core}"
        for other, placement in fixed:
            for address in set(spec.listen) & set(other.listen):
                core = placement.core
                why[core] = f"{address} is served by core {core} for disk {other.name}"
    if len(why) > 1:
        names = ", ".join(spec.name for spec in group)
        told = "; ".join(why.values())
        raise OSError(errno.EINVAL, f"disk {names}: a shared address has one worker, but {told}")
    there = [(spec, *stay[spec.name]) for spec in group if spec.name in stay]
    there.sort(key=lambda known: known[0] != known[1])  # those that change anyway come last
    places = (placement.core for _, _, placement in there)
    cores = [*why, *(core for core in places if core in machine.cores)]
    return cores[0] if cores else None


def _groups(specs: Sequence[DiskSpec]) -> list[list[DiskSpec]]:
    """Return the disks by those that have an address in common, also through others."""
    tied: dict[Address, dict[str, DiskSpec]] = {}
    for spec in specs:
        found = {id(group): group for address in spec.listen if (group := tied.get(address))}
        main, *others = sorted(found.values(), key=len, reverse=True) or [{}]
        for member in (spec, *(member for other in others for member in other.values())):
            main[member.name] = member
            tied.update(dict.fromkeys(member.listen, main))
    groups = [tied[spec.listen[0]] if spec.listen else {spec.name: spec} for spec in specs]
    return [list(group.values()) for group in {id(group): group for group in groups}.values()]


def _width(spec: DiskSpec, machine: Machine) -> tuple[int, bool]:
    """Return how many connections a disk has, and whether they are spread over cores."""
    connections = min(spec.connections, machine.cpus)  # more would carry nothing
    return connections, connections > 1 and machine.can_share(spec.backend)


def _least_loaded(spec: DiskSpec, load: Mapping[int, int], machine: Machine) -> int:
    connections, spread = _width(spec, machine)
    near = [core for core in machine.cores if core < connections] if spread else []
    return min(near or machine.cores, key=lambda core: (load.get(core, 0), core))


def _owned(spec: DiskSpec, owner: int, machine: Machine) -> Placement:
    connections, spread = _width(spec, machine)
    return Placement(
        owner, _spread(owner, connections, machine.cores) if spread else (owner,) * connections
    )


def _spread(owner: int, connections: int, cores: Sequence[int]) -> tuple[int, ...]:
    """Return the core of each connection: i for connection i, as the kernel sends from CPU i."""
    first = cores.index(owner)
    others = cycle((*cores[first:], *cores[:first]))
    spread = [core if core in cores else next(others) for core in range(connections)]
    if owner not in spread:
        spread[-1] = owner
    return tuple(spread)

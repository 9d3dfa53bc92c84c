"""Which disks can be in each other's way, found without a look at all of them."""

from __future__ import annotations

import os
from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from heapq import merge
from itertools import count
from operator import itemgetter
from typing import Final, TypeAlias

from reactor.control.configured import Configured
from reactor.control.disk import DiskControl
from reactor.control.holders import attach_hindrance, hindrance, named_first
from reactor.loop import Reactor
from reactor.spec import Address, DiskSpec

#: An address on a core, or a path and whether it is only read.
Stake: TypeAlias = tuple[Address, int] | tuple[str, bool]

_RANK: Final = itemgetter(0)


class Rivals:
    """The disks by what they have, or had: an entry may be out of date, but none is missing.

    Disks of one core share an address, and readers a path, by the thousand; in each other's way are
    only the others.
    """

    def __init__(self) -> None:
        self._disks: dict[Stake, list[tuple[int, DiskControl]]] = {}  # in the order of `_ranks`
        self._stakes: dict[DiskControl, set[Stake]] = {}
        self._ranks: dict[str, int] = {}  # by name: the place among all disks
        self._cores: set[int] = set()
        self._counter = count()

    def add(self, disk: DiskControl) -> None:
        """Note a disk, in the place of another of its name or after all."""
        self._ranks.setdefault(disk.spec.name, next(self._counter))
        self._stakes[disk] = set()
        self._cores.add(disk.placement.core)
        for path in _paths(disk.spec):
            self._note(disk, (path, disk.spec.readonly))
        self.listens(disk, disk.spec.listen)

    def listens(self, disk: DiskControl, addresses: Iterable[Address]) -> None:
        """Note where a disk listens, or will."""
        for address in addresses:
            self._note(disk, (address, disk.placement.core))

    def remove(self, disk: DiskControl, *, for_good: bool) -> None:
        """Forget a disk, but not its place unless it goes `for_good`."""
        rank = self._ranks[disk.spec.name]
        for stake in self._stakes.pop(disk):
            disks = self._disks[stake]
            del disks[bisect_left(disks, rank, key=_RANK)]
            if not disks:
                del self._disks[stake]
        if for_good:
            del self._ranks[disk.spec.name]

    def of(self, disk: DiskControl) -> Iterator[DiskControl]:
        """Yield those that may have what `disk` wants, in the order of all disks."""
        spec, core = disk.spec, disk.placement.core
        wanted: list[Stake] = [(a, other) for a in spec.listen for other in self._cores - {core}]
        wanted += [(path, False) for path in _paths(spec)]
        if not spec.readonly:
            wanted += [(path, True) for path in _paths(spec)]
        found = [self._disks[stake] for stake in wanted if stake in self._disks]
        return (other for _, other in merge(*found, key=_RANK))

    def _note(self, disk: DiskControl, stake: Stake) -> None:
        stakes = self._stakes.get(disk)
        if stakes is not None and stake not in stakes:
            stakes.add(stake)
            entry = (self._ranks[disk.spec.name], disk)
            insort(self._disks.setdefault(stake, []), entry, key=_RANK)


def _paths(spec: DiskSpec) -> set[str]:
    """Return what may be paths: a backend that cannot be loaded yet does not say which are."""
    return {os.path.normpath(text) for text in spec.options.values() if isinstance(text, str)}


class Neighbours:
    """What each disk must wait for, and who was told to wait."""

    def __init__(
        self, reactor: Reactor, disks: Mapping[str, DiskControl], configured: Configured
    ) -> None:
        self.rivals = Rivals()
        self._reactor = reactor
        self._disks = disks
        self._configured = configured
        self._told: dict[DiskControl, None] = {}
        self._waking = False

    def hindrance(self, disk: DiskControl) -> str:
        """See `holders.hindrance`."""
        return self._tell(disk, hindrance(disk, self.rivals.of(disk)))

    def attach_hindrance(self, disk: DiskControl, left: Collection[str]) -> str:
        """See `holders.attach_hindrance`; `left`: whose old devices are on their way to be free."""
        if disk.spec.name in left:
            return self._tell(disk, "waits for its old device to be free")
        return self._tell(disk, attach_hindrance(disk, self._disks.values(), self._coming()))

    def wake(self) -> None:
        """Let those go on soon that were told to wait: something has changed."""
        if self._told and not self._waking:  # once for all that changes in this turn
            self._waking = True
            self._reactor.call_from_thread(self._wake)

    def _wake(self) -> None:
        self._waking = False
        told, self._told = self._told, {}
        first = named_first(self._disks.values(), self._coming())
        for disk in told:
            if self._disks.get(disk.spec.name) is not disk:
                continue
            if first and disk.spec.device == "auto":
                self._told[disk] = None  # of no use to any of them yet, and they may be many
            else:
                self._reactor.call_from_thread(disk.step)

    def _coming(self) -> Iterator[DiskSpec]:
        return (successor.spec for successor in self._configured.successors.values())

    def _tell(self, disk: DiskControl, why: str) -> str:
        if why:
            self._told[disk] = None
        return why

"""Becoming what the config says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from reactor.control.disk import DiskControl
from reactor.control.obstacles import Uses, obstacle, obstacle_to_removal
from reactor.control.plan import Machine, Placement, place_anyhow, place_together
from reactor.control.platform import Platform
from reactor.control.saved import Desired, Successor, leaves, planned, reconfigured
from reactor.log import logger
from reactor.spec import DiskSpec

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the disks become what the config says: where, and which cannot, and why."""

    places: Mapping[str, Placement]
    obstacles: Mapping[str, str]


class Configured:
    """What the config says, as far as it is done or begun, and what takes the place of some disks.

    What a disk cannot become while it is in use is not done: the next who reads it tries again.
    """

    def __init__(self, platform: Platform, disks: Mapping[str, DiskControl]) -> None:
        self.specs: dict[str, DiskSpec] = {}
        self.successors: dict[str, Successor] = {}
        self.places: Mapping[str, Placement] = {}  # of all disks, as it was read again last
        self._platform = platform
        self._disks = disks

    def note(self, name: str, spec: DiskSpec | None) -> None:
        """Note what the config says of a disk, now that it is begun."""
        self.specs.pop(name, None)
        if spec is not None:
            self.specs[name] = spec

    def resume(self, now: Mapping[str, DiskSpec]) -> None:
        """Have the disks that an earlier controller left become what the config says now."""
        before = dict(self.specs)
        obstacles = self._obstacles(now, self.places, Uses(self._platform))
        self._let_go_of(before.keys() - now.keys(), obstacles)
        for name, disk in list(self._disks.items()):
            spec, was = now.get(name), before.get(name)
            if spec in (None, was):
                continue
            stays = disk.desired != "gone" and not disk.due
            if stays and disk.spec == reconfigured(disk.spec, was, spec):
                self.note(name, spec)
                continue
            if was is not None and disk.desired != "gone":  # these may be as the config says now
                self.note(name, replace(was, listen=disk.spec.listen, core=disk.spec.core))
            self._change(disk, spec, obstacles.get(name, ""))

    def plan(self, now: Mapping[str, DiskSpec], machine: Machine) -> Plan:
        """Return how all disks become what the config says now, beside those that must stay.

        Raises OSError EINVAL when there is no way.
        """
        before, disks = self.specs, self._disks
        running = {name: disk.wish.answered_spec for name, disk in disks.items()}
        running |= {name: successor.spec for name, successor in self.successors.items()}
        specs = planned(now, before, running)
        obstacles: dict[str, str] = {}
        uses = Uses(self._platform)
        while True:
            placed = [
                (disk.spec, disk.placement)
                for name, disk in disks.items()
                if name in obstacles or not leaves(disk.wish, before, now)
            ]
            movable = [spec for spec in specs if spec.name not in obstacles]
            try:
                places = place_together(movable, placed, machine)
            except OSError as error:
                why = "; ".join([str(error.strerror), *obstacles.values()])
                raise OSError(error.errno, why) from error
            found = self._obstacles(now, places, uses)
            if found.keys() <= obstacles.keys():
                return Plan(places, obstacles)
            obstacles |= found  # others follow the addresses that these keep

    def become(
        self, now: Mapping[str, DiskSpec], plan: Plan, begin: Callable[[DiskSpec], object]
    ) -> str:
        """Have all disks become what the config says now; `begin` makes those that are new.

        Returns what cannot be, for the operator: it is tried again when the config is read again.
        """
        before, self.places = dict(self.specs), plan.places
        for name, disk in self._disks.items():
            disk.obstacle = plan.obstacles.get(name, "")
        self._let_go_of(before.keys() - now.keys(), plan.obstacles)
        new = [spec for name, spec in now.items() if name not in self._disks]
        for name, disk in list(self._disks.items()):
            spec = now.get(name)
            if spec is None:
                continue
            retry = disk.state == "failed" or (disk.rising and disk.due)
            if disk.desired == "gone" or self._differs(disk, spec, self.places):
                self._change(disk, spec, disk.obstacle)
            elif retry and disk.desired == "online":
                disk.want("online")  # but one whose storage was removed waits for `start`
        for spec in new:  # who has their addresses or devices is on the way to let go
            self.note(spec.name, spec)
            begin(spec)
        return "; ".join(disk.obstacle for disk in self._disks.values() if disk.obstacle)

    def place_of(self, spec: DiskSpec, machine: Machine) -> Placement:
        """Return the place of what takes the place of a disk."""
        if spec.name in self.places:
            return self.places[spec.name]
        beside = [(d.spec, d.placement) for d in self._disks.values() if d.desired != "gone"]
        return place_anyhow(spec, beside, machine)

    def removed(self, disk: DiskControl) -> None:
        """Note that a disk goes, whatever the config said of it."""
        self.successors.pop(disk.spec.name, None)

    def is_succeeded(self, disk: DiskControl) -> bool:
        """Whether another disk takes over the storage of one that goes."""
        successor = self.successors.get(disk.spec.name)
        return successor is not None and successor.spec.same_storage(disk.spec)

    def _let_go_of(self, names: Iterable[str], obstacles: Mapping[str, str]) -> None:
        for name in names:
            disk = self._disks.get(name)
            if disk is not None and name in obstacles:
                self._leave(disk, obstacles[name])
                continue
            self.note(name, None)
            self.successors.pop(name, None)
            if disk is not None:
                disk.want("gone")

    @staticmethod
    def _leave(disk: DiskControl, why: str) -> None:
        disk.obstacle = why
        log.error("%s", why)

    def _change(self, disk: DiskControl, spec: DiskSpec, why_not: str) -> None:
        """Make `disk` what `spec` says, in place or by a new one."""
        name, before, wanted = spec.name, self.specs.get(spec.name), self._wanted(disk, spec)
        resized = before is None or not spec.same_size(before)
        if why_not:
            self._leave(disk, why_not)
        elif disk.desired == "gone" or not self._in_place(disk, wanted, self.places):
            log.info("disk %s is stopped, and made anew as the config says now", name)
            self.note(name, spec)
            self.successors[name] = self._successor(disk, wanted, resized=resized)
            disk.want("gone")
        else:
            self.note(name, spec)
            disk.change(wanted, resized=resized)

    def _successor(self, disk: DiskControl, wanted: DiskSpec, *, resized: bool) -> Successor:
        """Return what takes the place of `disk`: it serves what there is, should it not grow.

        What is due stays with `disk`, where a resize that ends meanwhile may overrule it.
        """
        earlier, desired = self.successors.get(wanted.name), self._desired(disk)
        if not wanted.same_storage(disk.spec):
            return Successor(wanted, desired)
        running = disk.spec if earlier is None else earlier.spec
        removed = disk.desired == "gone" and earlier is None
        size = running.options.get("size", disk.wish.made)
        if removed or size <= 1 or not wanted.same_storage(running):
            disk.due = wanted.options.get("size", 0)
            return Successor(wanted, desired)
        if resized:
            size = disk.spec.options.get("size", size)  # what is there, whatever was asked for
            asked = wanted.options.get("size", size)
            disk.due = asked if asked > size else 0
            size = size if disk.is_made else min(size, asked)
        return Successor(wanted.with_size(size), desired)

    def _wanted(self, disk: DiskControl, spec: DiskSpec) -> DiskSpec:
        """Return `spec`, which the config has, with what was changed at run time."""
        before, successor = self.specs.get(spec.name), self.successors.get(spec.name)
        if disk.desired == "gone" and successor is None:
            return spec
        running = disk.wish.answered_spec if successor is None else successor.spec
        return running if spec == before else reconfigured(running, before, spec)

    def _desired(self, disk: DiskControl) -> Desired:
        """Return what comes in the place of `disk` should be: one that was stopped stays so."""
        successor = self.successors.get(disk.spec.name)
        if successor is not None:
            return successor.desired
        return "stopped" if disk.desired == "stopped" else "online"

    def _obstacles(
        self, now: Mapping[str, DiskSpec], places: Mapping[str, Placement], uses: Uses
    ) -> dict[str, str]:
        """Return why disks must stay as they are, by name, if the others go to their places."""
        found: dict[str, str] = {}
        while True:
            kept = [self._disks[name] for name in found]
            more: dict[str, str] = {}
            for name, disk in self._disks.items():
                why = (
                    "" if name in found else self._obstacle(disk, now.get(name), places, kept, uses)
                )
                if why:
                    more[name] = why
            if not more:
                return found
            found |= more  # whose devices others may want

    def _obstacle(
        self,
        disk: DiskControl,
        spec: DiskSpec | None,
        places: Mapping[str, Placement],
        kept: Sequence[DiskControl],
        uses: Uses,
    ) -> str:
        if spec is None:
            known = disk.spec.name in self.specs
            return obstacle_to_removal(uses, disk) if known else ""
        if not self._differs(disk, spec, places):
            return ""
        wanted = self._wanted(disk, spec)
        in_place = self._in_place(disk, wanted, places)
        return obstacle(uses, disk, wanted, kept, in_place=in_place)

    def _differs(self, disk: DiskControl, spec: DiskSpec, places: Mapping[str, Placement]) -> bool:
        if spec != self.specs.get(spec.name):
            return True
        # One that is stopped is placed when it is started.
        return disk.desired != "stopped" and _is_misplaced(disk, places)

    def _in_place(
        self, disk: DiskControl, wanted: DiskSpec, places: Mapping[str, Placement]
    ) -> bool:
        return _can_become(disk, wanted) and not _is_misplaced(disk, places)


def _can_become(disk: DiskControl, spec: DiskSpec) -> bool:
    """Whether only its device, its listeners or its size differ."""
    here = replace(disk.spec, device=spec.device, listen=spec.listen)
    return here == spec or (
        "size" in here.options.keys() & spec.options.keys()
        and here == spec.with_size(here.options["size"])
    )


def _is_misplaced(disk: DiskControl, places: Mapping[str, Placement]) -> bool:
    """Whether it must go to another worker, as that of a disk with one of its addresses."""
    return places.get(disk.spec.name, disk.placement) != disk.placement

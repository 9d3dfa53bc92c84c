"""Becoming what the config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reactor.control.disk import DiskControl
from reactor.control.obstacles import obstacle
from reactor.control.plan import Placement
from reactor.control.platform import Platform
from reactor.control.saved import reconfigured
from reactor.log import logger
from reactor.spec import DiskSpec

log = logger(__name__)


class Configured:
    """What the config says, as far as it is done or begun, and what takes the place of some disks.

    It goes on disk by disk, to be saved together with what is done: what a controller that dies
    has not begun, the next finds undone. So is what a disk cannot become while it is in use.
    """

    def __init__(self, platform: Platform, disks: Mapping[str, DiskControl]) -> None:
        self.specs: Mapping[str, DiskSpec] = {}
        self.successors: dict[str, DiskSpec] = {}
        self.places: Mapping[str, Placement] = {}  # of all disks, as it was read again last
        self._growing: dict[str, DiskSpec] = {}  # what it says of disks whose size is on its way
        self._platform = platform
        self._disks = disks

    def note(self, name: str, spec: DiskSpec | None) -> None:
        """Note what the config says of a disk, now that it is begun."""
        others = {other: spec for other, spec in self.specs.items() if other != name}
        self.specs = others if spec is None else {**others, name: spec}

    def resume(self, now: Mapping[str, DiskSpec]) -> None:
        """Have the disks that an earlier controller left become what the config says now."""
        before = self.specs
        for name in before.keys() - now.keys():
            self._let_go(name)
        for name, disk in list(self._disks.items()):
            spec, was = now.get(name), before.get(name)
            if spec in (None, was):
                continue
            if disk.desired != "gone" and disk.spec == reconfigured(disk.spec, was, spec):
                self.note(name, spec)
            else:
                self._change(disk, spec)

    def become(
        self,
        now: Mapping[str, DiskSpec],
        places: Mapping[str, Placement],
        begin: Callable[[DiskSpec], None],
    ) -> str:
        """Have all disks become what the config says now; `begin` makes those that are new.

        Returns what cannot be, for the operator: it is tried again when the config is read again.
        """
        before, self.places = self.specs, places
        for disk in self._disks.values():
            disk.obstacle = ""
        for name in before.keys() - now.keys():
            self._let_go(name)
        new = [spec for name, spec in now.items() if name not in self._disks]
        for name, disk in list(self._disks.items()):
            spec = now.get(name)
            if spec is None:
                continue
            if spec != before.get(name) or disk.desired == "gone" or self._is_misplaced(disk):
                self._change(disk, spec)
            elif disk.state == "failed" and disk.desired == "online":
                disk.want("online")  # but one whose storage was removed waits for `start`
        for spec in new:  # who has their addresses or devices is on the way to let go
            self.note(spec.name, spec)
            begin(spec)
        return "; ".join(disk.obstacle for disk in self._disks.values() if disk.obstacle)

    def grown(self, disk: DiskControl) -> None:
        """Note that a disk has the size that the config says."""
        spec = self._growing.pop(disk.spec.name, None)
        if spec is not None:
            self.note(spec.name, spec)

    def stops(self, disk: DiskControl) -> None:
        """Leave to the disk's next start the size that the config says."""
        spec = self._growing.get(disk.spec.name)
        if spec is not None:
            disk.spec = disk.spec.with_size(spec.options.get("size", 0))
            self.grown(disk)

    def removed(self, disk: DiskControl) -> None:
        """Note that a disk goes, whatever the config said of it."""
        self.grown(disk)
        self.successors.pop(disk.spec.name, None)

    def is_succeeded(self, disk: DiskControl) -> bool:
        """Whether another disk takes over the storage of one that goes."""
        successor = self.successors.get(disk.spec.name)
        return successor is not None and successor.same_storage(disk.spec)

    def _let_go(self, name: str) -> None:
        self.note(name, None)
        self.successors.pop(name, None)
        self._growing.pop(name, None)
        if name in self._disks:
            self._disks[name].want("gone")

    def _change(self, disk: DiskControl, spec: DiskSpec) -> None:
        """Make `disk` what `spec` says, in place or by a new one, unless its device is in use."""
        name, wanted, before = spec.name, spec, self.specs.get(spec.name)
        if before is not None and spec.device == before.device:  # it may have another by now
            wanted = spec.with_device(disk.spec.device)
        in_place = disk.can_become(wanted) and not self._is_misplaced(disk)
        disk.obstacle = obstacle(self._platform, disk, wanted, in_place=in_place)
        if disk.obstacle:
            log.error("%s", disk.obstacle)
        elif disk.desired == "gone" or not in_place:
            log.info("disk %s is stopped, and made anew as the config says now", name)
            self.note(name, spec)
            self.successors[name] = wanted
            disk.want("gone")
        else:
            # A size is noted when it is there.
            self._growing[name] = spec
            self.note(name, spec.with_size(disk.spec.options.get("size", 0)))
            if wanted.options.get("size", 0) <= disk.spec.options.get("size", 0):
                self.grown(disk)
            disk.change(wanted)

    def _is_misplaced(self, disk: DiskControl) -> bool:
        """Whether it must go to another worker, as that of a disk with one of its addresses."""
        return self.places.get(disk.spec.name, disk.placement) != disk.placement

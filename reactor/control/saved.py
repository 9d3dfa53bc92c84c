"""What is running, as the next controller must know it, and what that makes of it. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal, TypeAlias

from reactor.control.plan import (
    Machine,
    Placement,
    PlaceOne,
    fits,
    fitting,
    place,
    place_all,
    place_anyhow,
    place_together,
)
from reactor.control.tags import disk
from reactor.errors import ReactorError
from reactor.spec import DiskSpec

VERSION: Final = 1

#: online: served; stopped: known, not served; gone: on its way to be forgotten.
Desired: TypeAlias = Literal["online", "stopped", "gone"]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a disk should be, and where."""

    spec: DiskSpec
    placement: Placement
    desired: Desired = "online"
    hot: bool = False  # removed, not stopped: what is written back would fail anyway
    former: tuple[int, ...] = ()  # other cores, of whose workers one may still have it open
    made: int = 0  # bytes that its storage had when it was last open; 0: it may be made
    attaching: bool = False  # to a device that was asked for at run time, for the first time
    due: int = 0  # bytes that the config asks for, if it does not have as many yet

    @property
    def answered_spec(self) -> DiskSpec:
        """The same without a device of which nobody was told yet."""
        return self.spec.with_device(None) if self.attaching else self.spec


@dataclass(frozen=True, slots=True)
class Successor:
    """What takes the place of a disk of its name that is on its way to be gone."""

    spec: DiskSpec
    desired: Desired = "online"


@dataclass(frozen=True, slots=True)
class SavedState:
    """The disks; what takes the place of some; and those that the config named, as it was read."""

    wishes: Sequence[Wish] = ()
    successors: Mapping[str, Successor] = field(default_factory=dict)
    configured: Mapping[str, DiskSpec] = field(default_factory=dict)
    complete: bool = True  # all that came later was saved too

    def outdated(self) -> SavedState:
        """Return what is still sure of it when something came later that is not known."""
        wishes = tuple(replace(wish, made=min(wish.made, 1)) for wish in self.wishes)
        return replace(self, wishes=wishes, complete=False)

    def as_held(self, now: Iterable[DiskSpec], held: Collection[str]) -> SavedState:
        """Return the same with what the config says of disks whose devices are there by it.

        `held`: the tags of all devices. What attached them could not be saved.
        """
        identities = {(disk(tag), tag.split(":")[2]) for tag in held}
        saved = {(wish.spec.name, wish.spec.identity()) for wish in self.wishes}
        there = {
            spec.name: spec for spec in now if (spec.name, spec.identity()) in identities - saved
        }
        wishes = tuple(
            Wish(there[wish.spec.name], wish.placement, former=wish.former, made=1)
            if wish.spec.name in there
            else wish
            for wish in self.wishes
        )
        successors = {name: each for name, each in self.successors.items() if name not in there}
        known = {wish.spec.name for wish in self.wishes}
        configured = {
            name: spec  # without what is new, which must not be taken for removed
            for name, spec in {**self.configured, **there}.items()
            if name in known or name not in there
        }
        return replace(self, wishes=wishes, successors=successors, configured=configured)

    def let_go(self) -> SavedState:
        """Return the same without what keeps storage from being made anew."""
        return replace(self, wishes=tuple(replace(wish, made=0) for wish in self.wishes))

    def encode(self, instance: str, boot: str) -> bytes:
        """Return the bytes to keep. `boot` names the time since the host was booted."""
        content = {
            "version": VERSION,
            "instance": instance,
            "boot": boot,
            "disks": [
                {
                    "spec": wish.spec.to_message(),
                    "core": wish.placement.core,
                    "connections": list(wish.placement.connections),
                    "desired": wish.desired,
                    "hot": wish.hot,
                    "former": list(wish.former),
                    "made": wish.made,
                    "attaching": wish.attaching,
                    "due": wish.due,
                }
                for wish in self.wishes
            ],
            "successors": [each.spec.to_message() for each in self.successors.values()],
            "stopped": [n for n, each in self.successors.items() if each.desired == "stopped"],
            "configured": [spec.to_message() for spec in self.configured.values()],
        }
        text = json.dumps(content)
        return f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n".encode()


def decode(data: bytes, instance: str, boot: str) -> SavedState:
    """Return what `encode` made; raises ReactorError that says what is wrong with the bytes.

    After another boot memory disks are gone, and images that were not synced: who relied on them
    is gone too, so all may be made again.
    """
    digest, _, text = data.partition(b"\n")
    if hashlib.sha256(text.removesuffix(b"\n")).hexdigest().encode() != digest:
        raise ReactorError("it is torn or was edited")
    content = json.loads(text)
    if content["version"] != VERSION:
        raise ReactorError(f"it is of version {content['version']}, not {VERSION}")
    if content["instance"] != instance:
        raise ReactorError(f"it is of another service, {content['instance']}")
    wishes = (_wish(plain) for plain in content["disks"])
    if content.get("boot") != boot:
        wishes = (replace(wish, made=0) for wish in wishes)
    stopped = content.get("stopped", ())  # an older release made them all online
    successors = {
        name: Successor(spec, "stopped" if name in stopped else "online")
        for name, spec in _by_name(content["successors"]).items()
    }
    return SavedState(tuple(wishes), successors, _by_name(content["configured"]))


def _by_name(plain: Sequence[Mapping[str, Any]]) -> dict[str, DiskSpec]:
    specs = (DiskSpec.from_message(spec) for spec in plain)
    return {spec.name: spec for spec in specs}


def _wish(plain: Mapping[str, Any]) -> Wish:
    placement = Placement(plain["core"], tuple(plain["connections"]))
    spec, former = DiskSpec.from_message(plain["spec"]), tuple(plain["former"])
    # An older release did not know these.
    made, attaching = plain.get("made", 0), plain.get("attaching", False)
    due = plain.get("due", 0)
    return Wish(spec, placement, plain["desired"], plain["hot"], former, made, attaching, due)


def reconfigured(running: DiskSpec, before: DiskSpec | None, now: DiskSpec) -> DiskSpec:
    """Return `now`, as the config has it, with what was changed at run time since `before`."""
    if before is None:
        return now
    if now.device == before.device:
        now = now.with_device(running.device)
    if "size" in running.options and now.same_storage(running) and now.same_size(before):
        now = now.with_size(running.options["size"])
    return now


def wishes_at_start(
    saved: SavedState, now: Mapping[str, DiskSpec], serving: Collection[int], machine: Machine
) -> list[Wish]:
    """Return what the disks should be: those that were saved, and what is new in the config.

    What a worker of the cores `serving` has stays at first as it is; the others listen at once
    where the config says. All else is changed in order then, as by a reload: the kernel may hold a
    device that was attached to the old storage, in the old way. A disk of the config that is not
    among those saved was removed at run time: only another config brings it back.
    """
    known = {wish.spec.name for wish in saved.wishes}
    new = [
        spec
        for name, spec in now.items()
        if name not in known and spec != saved.configured.get(name)
    ]
    renewed = [_renewed(wish, saved, now, serving, machine) for wish in saved.wishes]
    left = {wish.spec.name for wish in saved.wishes if leaves(wish, saved.configured, now)}
    try:
        wishes = _placed(renewed, left, machine, place)
    except OSError:  # with what lives, which keeps its addresses at first
        plain = [replace(wish, spec=fitting(wish.spec, machine)) for wish in saved.wishes]
        wishes = _placed(plain, left, machine, place_anyhow)
    # Beside what the others will be.
    beside = [
        (now.get(wish.spec.name, wish.spec), wish.placement)
        for wish in wishes
        if wish.spec.name not in left
    ]
    try:
        places = place_together(new, beside, machine)
    except OSError:
        places = place_all(new, beside, machine, place_anyhow)
    return [*wishes, *(Wish(spec, places[spec.name]) for spec in new)]


def _placed(
    wishes: Sequence[Wish], left: Collection[str], machine: Machine, place_one: PlaceOne
) -> list[Wish]:
    """Return the wishes with their places: where they were, if that can be."""
    # What leaves is in nobody's way.
    specs = [
        replace(wish.spec, core=None, listen=()) if wish.spec.name in left else wish.spec
        for wish in wishes
    ]
    stay = [
        (spec, wish.placement)
        for spec, wish in zip(specs, wishes, strict=True)
        if fits(spec, wish.placement, machine)
    ]
    places = place_all(specs, stay, machine, place_one)
    return [_moved(wish, places[wish.spec.name]) for wish in wishes]


def leaves(wish: Wish, configured: Mapping[str, DiskSpec], now: Mapping[str, DiskSpec]) -> bool:
    """Whether nothing of the disk stays: it is removed, or the config has it no more."""
    name = wish.spec.name
    return name not in now and (wish.desired == "gone" or name in configured)


def planned(
    now: Mapping[str, DiskSpec], before: Mapping[str, DiskSpec], running: Mapping[str, DiskSpec]
) -> list[DiskSpec]:
    """Return what the disks are to be: what the config says anew, else what they are."""
    return [
        running.get(name, spec) if spec == before.get(name) else spec for name, spec in now.items()
    ]


def _renewed(
    wish: Wish,
    saved: SavedState,
    now: Mapping[str, DiskSpec],
    serving: Collection[int],
    machine: Machine,
) -> Wish:
    was, before, spec = wish.spec, saved.configured.get(wish.spec.name), now.get(wish.spec.name)
    served = any(core in serving for core in wish.placement.cores)
    if spec is not None and spec != before and wish.desired != "gone" and not served:
        was = replace(was, listen=spec.listen, core=spec.core)
    return replace(wish, spec=fitting(was, machine))


def _moved(wish: Wish, placement: Placement) -> Wish:
    former = {*wish.former, *wish.placement.cores} - {*placement.cores}
    return replace(wish, placement=placement, former=tuple(sorted(former)))

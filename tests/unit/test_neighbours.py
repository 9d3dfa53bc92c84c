"""The index of disks that can be in each other's way finds what a look at all of them finds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from reactor.control.configured import Configured
from reactor.control.holders import hindrance
from reactor.control.neighbours import Neighbours, Rivals
from reactor.control.plan import Placement
from reactor.loop import Reactor
from reactor.spec import Address, DiskSpec

DISKS = 400
ADDRESSES = [Address("unix", f"/run/{number}.sock") for number in range(4)]
PATHS = ["/srv/a", "/srv/./a", "/srv/b", "/srv/c"]


@dataclass(eq=False)
class Disk:
    """What is looked at of a disk."""

    spec: DiskSpec
    placement: Placement
    desired: str = "online"
    settled: bool = False
    rising: bool = True
    path: str | None = None
    is_made: bool = False
    addresses: set[Address] = field(default_factory=set)
    steps: int = 0

    def step(self) -> None:
        self.steps += 1


def made(name: str, *, core: int = 0, listen: Iterable[Address] = (), **keys: Any) -> Any:
    device = keys.pop("device", None)
    readonly = keys.pop("readonly", False)
    spec = DiskSpec(
        name, "file", keys, device=device, listen=tuple(listen), core=core, readonly=readonly
    )
    return Disk(spec, Placement(core, (core,)))


def any_disk(dice: random.Random, name: str) -> Any:
    listen = dice.sample(ADDRESSES, dice.randint(0, 2))
    disk = made(
        name,
        core=dice.randint(0, 2),
        listen=listen,
        path=dice.choice(PATHS),
        readonly=dice.random() < 0.3,
    )
    disk.addresses = {*dice.sample(listen, dice.randint(0, len(listen)))}
    disk.desired = dice.choice(["online", "online", "gone"])
    disk.rising = disk.desired == "online" and dice.random() < 0.8
    disk.settled, disk.is_made = dice.random() < 0.5, dice.random() < 0.5
    disk.path = dice.choice([None, "/dev/nbd0"])
    return disk


def outcome(disk: Any, others: Iterable[Any]) -> str:
    try:
        return hindrance(disk, others)
    except OSError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(60))
def test_what_hinders_a_disk_is_what_all_of_them_tell(seed: int) -> None:
    dice = random.Random(seed)
    disks: dict[str, Any] = {}
    rivals = Rivals()
    for number in range(80):
        name = f"disk{dice.randint(0, 12)}"
        if name in disks and dice.random() < 0.3:
            rivals.remove(disks.pop(name), for_good=True)
        elif name in disks and dice.random() < 0.5:  # it listens elsewhere, and does not yet
            listen = dice.sample(ADDRESSES, 2)
            rivals.listens(disks[name], listen)
            disks[name].addresses = {*dice.sample(listen, 1)}
        else:
            if name in disks:
                rivals.remove(disks[name], for_good=False)
            disks[name] = any_disk(dice, name)
            rivals.add(disks[name])
        for disk in (*disks.values(), any_disk(dice, f"new{number}")):
            assert outcome(disk, rivals.of(disk)) == outcome(disk, disks.values())
    for disk in disks.values():
        rivals.remove(disk, for_good=True)
    assert not rivals._disks
    assert not rivals._ranks


@pytest.mark.parametrize(
    "disk",
    [
        lambda number: made(f"{number}", path=f"/srv/{number}"),
        lambda number: made(f"{number}", path="/srv/a", readonly=True),
        lambda number: made(f"{number}", path=f"/srv/{number}", listen=ADDRESSES),
        lambda number: made(f"{number}", size=1 << 20, listen=ADDRESSES),
    ],
    ids=["own_paths", "readers", "one_address", "no_paths"],
)
def test_disks_that_cannot_be_in_each_others_way_are_not_looked_at(
    disk: Callable[[int], Any],
) -> None:
    rivals, disks = Rivals(), [disk(number) for number in range(DISKS)]
    for each in disks:
        rivals.add(each)
    assert sum(len([*rivals.of(each)]) for each in disks) <= DISKS


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor("interrupt")
    yield made
    made.close()


Known = tuple[Neighbours, dict[str, Any]]


@pytest.fixture
def known(reactor: Reactor) -> Known:
    disks: dict[str, Any] = {}
    nowhere: Any = None
    return Neighbours(reactor, disks, Configured(nowhere, disks)), disks


def turn(reactor: Reactor) -> None:
    while reactor._calls:
        reactor.turn()


def test_who_was_told_to_wait_goes_on_once_for_all_that_changed(
    known: Known, reactor: Reactor
) -> None:
    neighbours, disks = known
    leaves, waits, other = (made(name, path="/srv/a") for name in ("leaves", "waits", "other"))
    leaves.desired, leaves.rising = "gone", False
    disks |= {"leaves": leaves, "waits": waits, "other": other}
    for disk in disks.values():
        neighbours.rivals.add(disk)
    assert neighbours.hindrance(waits) == "waits for disk leaves to leave /srv/a"
    for _ in range(DISKS):
        neighbours.wake()
    turn(reactor)
    assert (leaves.steps, waits.steps, other.steps) == (0, 1, 0)


def test_who_takes_any_device_goes_on_when_nobody_waits_for_a_certain_one(
    known: Known, reactor: Reactor
) -> None:
    neighbours, disks = known
    names, takes = made("names", device="/dev/nbd3"), made("takes", device="auto")
    disks |= {"names": names, "takes": takes}
    assert neighbours.attach_hindrance(takes, ()) == "waits for disk names to be on /dev/nbd3"
    for path, steps in ((None, 0), ("/dev/nbd3", 1)):
        names.path = path
        neighbours.wake()
        turn(reactor)
        assert takes.steps == steps
    assert neighbours.attach_hindrance(takes, ()) == ""

"""Placement of disks on cores."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from reactor.control.plan import Machine, Placement, place, place_all, place_together
from reactor.spec import Address, DiskSpec

SHARED = Address("tcp", "0.0.0.0", 10809)


def disk(name: str, core: int | None = None, *listen: Address, connections: int = 1) -> DiskSpec:
    return DiskSpec(name, "null", core=core, listen=listen, connections=connections)


def on(*cores: int, cpus: int = 4, shared: bool = True) -> Machine:
    return Machine(cores, cpus, lambda _backend: shared)


def owners(specs: Sequence[DiskSpec], machine: Machine) -> dict[str, int]:
    return {name: placement.core for name, placement in place_all(specs, [], machine).items()}


def test_disks_spread_over_the_cores() -> None:
    cores = owners([disk(str(n)) for n in range(8)], on(0, 1, 2, 3))
    assert sorted(cores.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_disk_goes_to_the_core_it_names_and_the_others_fill_up() -> None:
    cores = owners([disk("a"), disk("b"), disk("c", 0), disk("d", 0)], on(0, 1))
    assert cores == {"a": 1, "b": 1, "c": 0, "d": 0}


def test_disks_of_one_listener_share_a_worker() -> None:
    specs = [disk("a", None, SHARED), disk("b"), disk("c", None, SHARED)]
    cores = owners(specs, on(0, 1, 2))
    assert cores["a"] == cores["c"]


def test_a_listener_cannot_be_on_two_cores() -> None:
    placed = [(disk("a", 0, SHARED), Placement(0, (0,)))]
    with pytest.raises(OSError, match=r"tcp:0\.0\.0\.0:10809 is served by core 0 for disk a"):
        place(disk("b", 1, SHARED), placed, on(0, 1))


def test_a_core_without_worker_is_refused() -> None:
    with pytest.raises(OSError, match="disk a: no worker runs on core 7"):
        place(disk("a", 7), [], on(0, 1))


@pytest.mark.parametrize(
    ("connections", "cores", "owner", "expected"),
    [
        (4, (0, 1, 2, 3), None, (0, 1, 2, 3)),  # each at the worker of the CPU that sends on it
        (2, (0, 1, 2, 3), None, (0, 1)),
        (4, (0, 1), None, (0, 1, 0, 1)),
        (4, (0, 1), 1, (0, 1, 1, 0)),
        (4, (2, 3), None, (2, 3, 2, 3)),
        (4, (1, 2, 3), None, (1, 1, 2, 3)),
        (2, (0, 1, 2, 3), 3, (0, 3)),  # the owner has one
        (16, (0, 1, 2, 3), 0, (0, 1, 2, 3)),  # more than there are CPUs would carry nothing
        (3, (0,), None, (0, 0, 0)),
    ],
)
def test_connections_go_to_the_core_that_sends_on_them(
    connections: int, cores: tuple[int, ...], owner: int | None, expected: tuple[int, ...]
) -> None:
    placement = place(disk("w", owner, connections=connections), [], on(*cores))
    assert placement.connections == expected
    assert placement.core in expected
    assert owner in (None, placement.core)
    assert set(placement.cores) == set(expected)
    assert placement.cores[0] == placement.core


def test_connections_to_a_backend_that_is_not_shared_stay_together() -> None:
    placement = place(disk("w", 2, connections=3), [], on(0, 1, 2, shared=False))
    assert placement == Placement(2, (2, 2, 2))


def test_a_wide_disk_counts_on_each_of_its_cores() -> None:
    wide = disk("w", 0, connections=2)
    assert owners([wide, disk("a"), disk("b")], on(0, 1, 2)) == {"w": 0, "a": 2, "b": 0}


OTHER = Address("tcp", "0.0.0.0", 10810)


HERE = (disk("a", None, SHARED), Placement(0, (0,)))
THERE = (disk("b", None, OTHER), Placement(1, (1,)))


@pytest.mark.parametrize(
    ("specs", "placed", "expected"),
    [
        ([disk("a", 0, OTHER), disk("b", 1, SHARED)], [HERE, THERE], {"a": 0, "b": 1}),
        ([disk("b", None, SHARED), disk("c", 1, SHARED)], [THERE], {"b": 1, "c": 1}),
        ([disk("a", None, SHARED), disk("b", None, SHARED)], [HERE, THERE], {"a": 0, "b": 0}),
        ([disk("a", None, OTHER), THERE[0]], [HERE, THERE], {"a": 1, "b": 1}),
        (
            [disk("c", None, SHARED, OTHER), HERE[0], THERE[0]],
            [HERE, THERE],
            dict.fromkeys("abc", 0),
        ),
        ([disk("c")], [HERE], {"a": 0, "c": 1}),
    ],
)
def test_disks_are_placed_together(
    specs: list[DiskSpec], placed: list[tuple[DiskSpec, Placement]], expected: dict[str, int]
) -> None:
    found = place_together(specs, placed, on(0, 1))
    assert {name: placement.core for name, placement in found.items()} == expected


def test_a_wide_disk_stays_as_it_is_when_there_are_more_cores() -> None:
    narrow = (disk("w", None, connections=4), Placement(0, (0, 0, 0, 0)))
    assert place_together([narrow[0]], [narrow], on(0, 1)) == {"w": narrow[1]}
    wider = disk("w", None, connections=2)
    assert place_together([wider], [narrow], on(0, 1)) == {"w": Placement(0, (0, 1))}
    unshared = place_together([wider], [(wider, Placement(0, (0, 1)))], on(0, 1, shared=False))
    assert unshared == {"w": Placement(0, (0, 0))}


def test_what_is_not_to_move_can_make_that_impossible() -> None:
    with pytest.raises(OSError, match=r"disk c: a shared address has one worker, but tcp:"):
        place_together([disk("c", None, SHARED, OTHER)], [HERE, THERE], on(0, 1))


def test_many_disks_of_one_address_are_placed_soon() -> None:
    found = place_together([disk(str(n), None, SHARED) for n in range(4096)], [], on(0, 1))
    assert len({placement.core for placement in found.values()}) == 1

"""Placement of disks on cores."""

from __future__ import annotations

import pytest

from reactor.control.plan import place, place_all
from reactor.spec import Address, DiskSpec

SHARED = Address("tcp", "0.0.0.0", 10809)


def disk(name: str, core: int | None = None, *listen: Address) -> DiskSpec:
    return DiskSpec(name, "null", core=core, listen=listen)


def test_disks_spread_over_the_cores() -> None:
    cores = place_all([disk(str(n)) for n in range(8)], [0, 1, 2, 3])
    assert sorted(cores.values()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_disk_goes_to_the_core_it_names_and_the_others_fill_up() -> None:
    cores = place_all([disk("a"), disk("b"), disk("c", 0), disk("d", 0)], [0, 1])
    assert cores == {"a": 1, "b": 1, "c": 0, "d": 0}


def test_disks_of_one_listener_share_a_worker() -> None:
    cores = place_all([disk("a", None, SHARED), disk("b"), disk("c", None, SHARED)], [0, 1, 2])
    assert cores["a"] == cores["c"]


def test_a_listener_cannot_be_on_two_cores() -> None:
    with pytest.raises(OSError, match=r"tcp:0\.0\.0\.0:10809 is served by core 0 for disk a"):
        place(disk("b", 1, SHARED), [(disk("a", 0, SHARED), 0)], [0, 1])


def test_a_core_without_worker_is_refused() -> None:
    with pytest.raises(OSError, match="disk a: no worker runs on core 7"):
        place(disk("a", 7), [], [0, 1])

"""A strict start that fails, and is tried again: it leaves devices to those who use them."""

from __future__ import annotations

import errno

import pytest

from tests.simulation.hosts import Hosts

NAMES = ("stays", "moves", "plain", "wide")


def devices(hosts: Hosts) -> dict[str, str]:
    return {device.disk: device.path for device in hosts.host.driver.configured()}


def die_and_fail(hosts: Hosts) -> None:
    """End everything; from now on the storage of one disk cannot be opened."""
    hosts.host.store.refusals["moves"] = OSError(errno.ENOENT, "is gone")
    hosts.service.change(strict=True)
    hosts.die()


@pytest.mark.parametrize("wants_its_device", [False, True])
@pytest.mark.parametrize("saved", [False, True], ids=["nothing saved", "saved"])
def test_a_device_stays_for_the_start_that_succeeds(
    hosts: Hosts, *, wants_its_device: bool, saved: bool
) -> None:
    """Also when another disk, by its new config, waits for the device of the one that fails."""
    before = devices(hosts)
    if wants_its_device:
        hosts.free("stays")
        del before["stays"]
        hosts.configure("stays", device=before["moves"])
    die_and_fail(hosts)
    if not saved:
        hosts.host.saved = None
    hosts.await_true(lambda: hosts.service.exit_status == 1)
    hosts.let_pass(10)
    assert devices(hosts) == before
    if wants_its_device:
        hosts.configure("stays", device=None)
    del hosts.host.store.refusals["moves"]
    hosts.await_states(**dict.fromkeys(NAMES, "online"))
    assert devices(hosts) == before


@pytest.mark.parametrize("others", [False, True], ids=["killed", "of another version"])
def test_memory_without_a_device_stays_also_when_nothing_is_saved(
    hosts: Hosts, *, others: bool
) -> None:
    for name in ("stays", "moves", "wide"):
        hosts.free(name)
        hosts.configure(name, device=None)
    memories = sorted(hosts.host.store.memories())
    if others:
        hosts.host.version += 1
        hosts.host.store.refusals["moves"] = OSError(errno.ENOENT, "is gone")
        hosts.service.change(strict=True)
        hosts.service.die()
    else:
        die_and_fail(hosts)
    hosts.host.saved = None
    hosts.await_true(lambda: hosts.service.exit_status == 1)
    assert sorted(hosts.host.store.memories()) == memories

"""A worker whose core the next controller does not use ends late: nobody but its disks waits."""

from __future__ import annotations

import re
import signal

import pytest

from tests.simulation.hosts import Hosts


def test_a_stuck_worker_holds_up_its_own_disks_alone(hosts: Hosts) -> None:
    stuck, serving = hosts.worker(1), hosts.worker(0)
    for storage in stuck.worker.disks.values():
        storage.storage.hung = storage.spec.name != "wide"
    hosts.await_true(stuck.has_hung_operation)  # it waits for the medium, whatever it is told
    stuck.send_signal(signal.SIGKILL)
    hosts.let_pass(0.5)
    assert stuck.waits_for_medium()
    hosts.move_to_core_0()
    waiting = {"stays": "online", "moves": "starting", "plain": "starting", "wide": "starting"}
    hosts.await_states(**waiting)
    hosts.let_pass(60)
    assert hosts.states() == waiting
    assert hosts.worker(0) is serving
    assert hosts.reasons()["moves"] == (
        "waits for the end of the worker of core 1, which may have it open"
    )
    hosts.host.store.heal()
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")


def test_a_worker_may_take_long_to_drain(hosts: Hosts) -> None:
    slow = hosts.worker(1)
    moving = slow.worker.disks["moves"].storage
    moving.hung = True
    hosts.await_true(slow.has_hung_operation)
    hosts.move_to_core_0()
    hosts.let_pass(16)
    assert not slow.gone
    moving.hung = False
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")
    assert slow.gone
    assert hosts.signals(signal.SIGTERM, slow) == 1
    assert hosts.signals(signal.SIGKILL, slow) == 0


def test_a_worker_that_never_ends_by_itself_is_killed(hosts: Hosts) -> None:
    silent = hosts.worker(1)
    silent.send_signal(signal.SIGSTOP)
    hosts.move_to_core_0()
    hosts.await_states(stays="online", moves="starting", plain="starting", wide="starting")
    assert not silent.gone
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")
    assert hosts.signals(signal.SIGKILL, silent) == 1


def test_without_a_saved_state_every_disk_waits(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    stuck = hosts.worker(1)
    stuck.send_signal(signal.SIGSTOP)
    hosts.host.saved = None
    hosts.move_to_core_0()
    # The worker that stays says that it has this one; it serves on.
    hosts.await_states(stays="online", moves="starting", plain="starting", wide="starting")
    hosts.let_pass(3)
    assert "what ran before is not fully known" in caplog.text
    assert not any(storage.openers.keys() - {stuck} for storage in hosts.storages(stuck))
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")
    assert stuck.gone


def test_an_outdated_state_discards_nothing_under_the_worker_that_has_it(hosts: Hosts) -> None:
    """Whether that says so, and is killed for it, or says nothing for long."""
    owner = hosts.worker(1)
    hosts.free("moves")
    if hosts.world.chance(0.5):
        owner.send_signal(signal.SIGSTOP)
    hosts.misplace("moves")
    hosts.await_states(stays="online", plain="online", wide="online")
    assert owner.gone
    assert "moves" not in hosts.host.store.memories()


def test_a_worker_of_another_version_that_drains_for_too_long_is_aborted(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    slow = hosts.worker(1)
    slow.worker.disks["moves"].storage.hung = True
    hosts.await_true(slow.has_hung_operation)
    hosts.host.version += 1
    hosts.service.die()
    hosts.let_pass(45)
    assert hosts.signals(signal.SIGABRT, slow) == 1
    assert re.search(rf"\(pid {slow.pid}\) has not ended after (29|3[0-3]) s: aborted", caplog.text)
    assert "is silent" not in caplog.text
    hosts.host.store.heal()
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")

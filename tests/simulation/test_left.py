"""What a dead service left of disks that there are not any more."""

from __future__ import annotations

import signal

import pytest

from tests.simulation.hosts import Hosts, device_of


@pytest.mark.parametrize("stops", [False, True], ids=["serves on", "stops"])
def test_a_device_is_detached_when_no_worker_can_have_it_any_more(
    hosts: Hosts, *, stops: bool
) -> None:
    """The kernel tells the other end, and waits for ever for one that does not read."""
    hosts.finish_applications()
    worker = hosts.worker(1)
    worker.send_signal(signal.SIGSTOP)
    hosts.service.die()
    hosts.host.saved = None
    hosts.service.config = tuple(spec for spec in hosts.service.config if spec.name != "moves")

    def is_held() -> bool:
        return any(device.disk == "moves" for device in hosts.host.driver.configured())

    hosts.await_true(lambda: hosts.states().keys() == {"stays", "plain", "wide"})
    if stops:
        assert hosts.service.controller is not None
        hosts.service.controller.shut_down()
    hosts.await_true(lambda: worker.gone or not is_held())
    assert is_held()
    hosts.await_true(lambda: not is_held())
    if not stops:
        hosts.await_states(stays="online", plain="online", wide="online")


def test_a_device_is_detached_once_there_is_what_that_takes(hosts: Hosts) -> None:
    hosts.finish_applications()
    hosts.die()
    hosts.host.saved = None
    hosts.service.config = tuple(spec for spec in hosts.service.config if spec.name != "moves")
    device = device_of(hosts, "moves")
    hosts.host.faults.short = ("nothing to detach a device with",)
    hosts.await_true(lambda: hosts.states().get("stays") == "online")
    hosts.let_pass(5)
    assert device.configured
    hosts.host.faults.end()
    hosts.await_true(lambda: not device.configured)

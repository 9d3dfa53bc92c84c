"""A disk of two workers is cut, and one of them dies in the middle."""

from __future__ import annotations

import signal

import pytest

from tests.simulation.hosts import MIB, Hosts


@pytest.mark.parametrize("core", [0, 1])
def test_the_kernel_believes_in_no_block_that_is_to_go(hosts: Hosts, core: int) -> None:
    controller = hosts.service.controller
    assert controller is not None
    device = next(d for d in hosts.host.driver.configured() if d.disk == "wide")
    hosts.worker(core).send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    controller.resize("wide", MIB // 2, answers.append)
    hosts.await_true(lambda: device.size == MIB // 2)
    hosts.worker(core).send_signal(signal.SIGKILL)
    while not answers:
        hosts.let_pass(0.01)
        assert device.size == MIB // 2
    assert answers == [None]
    assert {worker.disks["wide"].size for worker in hosts.workers()} == {MIB // 2}

"""A disk changes its size, or cannot, and who serves it dies or hangs in the middle."""

from __future__ import annotations

import errno
import os
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


@pytest.mark.parametrize("both", [False, True], ids=["worker", "both"])
def test_what_cannot_grow_serves_on_should_its_worker_die_before_it_says_so(
    hosts: Hosts, *, both: bool
) -> None:
    controller = hosts.service.controller
    assert controller is not None
    hosts.host.store.sizes_max["moves"] = MIB
    hosts.worker(1).send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    controller.resize("moves", 2 * MIB, answers.append)
    hosts.let_pass(0.1)
    hosts.worker(1).send_signal(signal.SIGKILL)
    if both:
        hosts.service.die()
    hosts.let_pass(30)
    assert hosts.states()["moves"] == "online"
    assert both or str(answers) == str([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])


def test_a_refusal_is_told_when_nobody_shows_the_size_that_was_refused(hosts: Hosts) -> None:
    """The follower had it already, and is silent when the leader refuses."""
    controller = hosts.service.controller
    assert controller is not None
    device = next(d for d in hosts.host.driver.configured() if d.disk == "wide")
    leader, follower = (hosts.worker(core) for core in controller.disk("wide").cores)
    leader.send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    controller.resize("wide", MIB // 2, answers.append)
    hosts.await_true(lambda: follower.worker.disks["wide"].size == MIB // 2)
    hosts.let_pass(2.5)
    follower.send_signal(signal.SIGSTOP)
    hosts.let_pass(6.5)
    hosts.host.faults.short = ("a resize is refused",)
    leader.send_signal(signal.SIGCONT)
    while not answers:
        hosts.let_pass(0.1)
        shown = [w.disks["wide"].size for w in hosts.workers() if "wide" in w.disks]
        assert device.size <= min(shown)
    assert shown == [MIB, MIB]
    assert device.size == MIB

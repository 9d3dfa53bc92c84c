"""A disk changes its size, or cannot, and who serves it dies or hangs in the middle."""

from __future__ import annotations

import errno
import os
import signal
from functools import partial

import pytest

from reactor.control.controller import Controller
from tests.simulation.devices import NetlinkDevice, Waits
from tests.simulation.hosts import MIB, Hosts, device_of
from tests.simulation.world import NS


@pytest.mark.parametrize("core", [0, 1])
def test_the_kernel_believes_in_no_block_that_is_to_go(
    hosts: Hosts, controller: Controller, core: int
) -> None:
    device = device_of(hosts, "wide")
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


def test_a_resize_in_the_middle_of_another_is_told_why_not(
    hosts: Hosts, controller: Controller
) -> None:
    answers: list[Exception | None] = []
    controller.resize("wide", 2 * MIB, answers.append)
    controller.resize("wide", 3 * MIB, answers.append)
    assert str(answers) == str([OSError(errno.EBUSY, "disk wide is being resized")])
    hosts.let_pass(1)
    assert answers[1:] == [None]


@pytest.mark.parametrize("both", [False, True], ids=["worker", "both"])
def test_what_cannot_grow_serves_on_should_its_worker_die_before_it_says_so(
    hosts: Hosts, controller: Controller, *, both: bool
) -> None:
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


def test_a_refusal_is_told_when_nobody_shows_the_size_that_was_refused(
    hosts: Hosts, controller: Controller
) -> None:
    """The follower had it already, and is silent when the leader refuses."""
    device = device_of(hosts, "wide")
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


@pytest.mark.parametrize("disk", ["moves", "wide"])
@pytest.mark.parametrize("milliseconds", [0, 1])
def test_a_service_that_stops_cuts_no_storage_whose_size_it_saves_no_more(
    hosts: Hosts, controller: Controller, disk: str, milliseconds: int
) -> None:
    hosts.service.change(on_exit="keep")
    answers: list[Exception | None] = []
    controller.resize(disk, MIB // 2, answers.append)
    hosts.let_pass(milliseconds / 1000)
    assert not answers
    controller.shut_down(keep=True)
    hosts.let_pass(60)
    assert hosts.states()[disk] == "online"
    assert isinstance(answers[0], OSError)
    assert answers[0].errno == errno.ESHUTDOWN


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("milliseconds", [0, 2, 10])
def test_a_service_that_stops_tells_the_kernel_of_no_block_that_is_not_saved(
    hosts: Hosts, controller: Controller, milliseconds: int
) -> None:
    hosts.service.change(on_exit="keep")
    device = device_of(hosts, "wide")
    controller.resize("wide", 2 * MIB, lambda _: None)
    hosts.let_pass(milliseconds / 1000)
    controller.shut_down(keep=True)
    sizes = [device.size]
    for _ in range(600):
        hosts.let_pass(0.1)
        sizes.append(device.size)
    assert sizes == sorted(sizes)
    assert hosts.states()["wide"] == "online"


def test_a_cut_that_is_refused_while_the_disk_stops_is_not_done_by_its_next_start(
    hosts: Hosts, controller: Controller, on_a_device: None
) -> None:
    answers: list[Exception | None] = []
    leader = hosts.refuse_cut(answers.append)
    controller.stop("wide", lambda _: None)
    leader.send_signal(signal.SIGCONT)
    hosts.let_pass(10)
    assert answers != [None]
    hosts.host.faults.short = ()
    controller.start("wide", lambda _: None)
    hosts.let_pass(10)
    assert controller.disk("wide").size == MIB


@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB], ids=["cut", "grow"])
def test_who_died_and_is_back_opens_the_disk_before_it_is_resized_there(
    hosts: Hosts, controller: Controller, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """The one that is asked first takes its time, and the other dies meanwhile."""
    # Nothing is slow by chance: who waits for a boot that is, is killed.
    monkeypatch.setattr(hosts.world, "chance", lambda _: False)
    leader, follower = controller.disk("wide").cores
    first, second = (follower, leader) if size < MIB else (leader, follower)
    slow = hosts.worker(first)
    slow.send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    controller.resize("wide", size, answers.append)
    hosts.let_pass(0.2)
    hosts.worker(second).send_signal(signal.SIGKILL)
    hosts.let_pass(1)
    hosts.await_true(lambda: second in hosts.host.core_locks)
    hosts.let_pass(0.5)
    again = hosts.worker(second)
    slow.send_signal(signal.SIGCONT)
    hosts.let_pass(20)
    assert answers == [None]
    assert (hosts.worker(first), hosts.worker(second)) == (slow, again)
    assert {worker.disks["wide"].size for worker in hosts.workers()} == {size}


@pytest.mark.usefixtures("on_a_device")
@pytest.mark.parametrize("milliseconds", [2, 3, 4])
@pytest.mark.parametrize("size", [MIB // 2, 2 * MIB], ids=["cut", "grow"])
def test_what_all_show_is_what_they_are_told_to_open_next(
    hosts: Hosts, controller: Controller, size: int, milliseconds: int
) -> None:
    """Who changes the storage dies with the controller, and later all die."""
    device = device_of(hosts, "wide")
    leader, _ = (hosts.worker(core) for core in controller.disk("wide").cores)
    controller.resize("wide", size, lambda _: None)
    hosts.let_pass(milliseconds / 1000)
    leader.send_signal(signal.SIGKILL)
    hosts.service.die()
    hosts.let_pass(40)
    shown = device.size
    for core in (0, 1):
        hosts.worker(core).send_signal(signal.SIGKILL)
    hosts.let_pass(30)
    assert hosts.states()["wide"] == "online"
    assert device.size == shown


@pytest.mark.usefixtures("on_a_device")
def test_the_kernel_believes_in_no_block_that_a_new_worker_does_not_show_yet(
    hosts: Hosts, controller: Controller
) -> None:
    device = device_of(hosts, "wide")
    leader, follower = (hosts.worker(core) for core in controller.disk("wide").cores)
    follower.send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    controller.resize("wide", 2 * MIB, answers.append)
    hosts.await_true(lambda: leader.worker.disks["wide"].size == 2 * MIB)
    hosts.let_pass(0.05)
    follower.send_signal(signal.SIGKILL)
    hosts.let_pass(20)
    assert answers == [None]
    assert device.size == 2 * MIB


def test_the_next_controller_learns_the_size_from_who_changes_the_storage(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.configure("wide", options={"size": 2 * MIB})
    device = device_of(hosts, "wide")
    leader, _ = (hosts.worker(core) for core in controller.disk("wide").cores)
    hosts.reload()
    hosts.await_true(lambda: leader.worker.disks["wide"].size == 2 * MIB)
    hosts.service.die()
    hosts.let_pass(60)
    assert device.size == 2 * MIB
    assert {worker.disks["wide"].size for worker in hosts.workers()} == {2 * MIB}


def test_a_device_that_takes_its_size_too_late_gets_the_right_one(
    hosts: Hosts, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel waits for what is in flight, longer than we for the kernel."""
    resize, began = NetlinkDevice.resize, hosts.world.now

    def resize_late(self: NetlinkDevice, size: int, block_size: int) -> None:
        if size == MIB // 2 and hosts.world.now - began < 40 * NS:
            raise Waits(partial(resize_late, self, size, block_size))
        resize(self, size, block_size)

    monkeypatch.setattr(NetlinkDevice, "resize", resize_late)
    device = device_of(hosts, "moves")
    answers: list[Exception | None] = []
    controller.resize("moves", MIB // 2, answers.append)
    hosts.await_true(lambda: device.size == MIB // 2)
    assert "did not finish" in str(answers)
    hosts.let_pass(0.2)
    assert device.size == MIB
    hosts.let_pass(20)
    assert device.size == MIB

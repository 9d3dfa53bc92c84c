"""The config says another size: it is had once it can be, and is the last word until another is."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from reactor.control.controller import Controller
from reactor.spec import Address, DiskSpec
from tests.simulation.hosts import MIB, Hosts, device_of


def test_what_the_config_says_last_is_not_forgotten_when_a_size_before_is_reached(
    hosts: Hosts,
) -> None:
    device = device_of(hosts, "moves")
    hosts.worker(1).send_signal(signal.SIGSTOP)
    for size in (5 * MIB, 8 * MIB):
        hosts.configure("moves", options={"size": size})
        hosts.reload()
        hosts.let_pass(0.1)
    hosts.worker(1).send_signal(signal.SIGCONT)
    hosts.await_true(lambda: device.size == 5 * MIB)
    hosts.service.die()
    hosts.let_pass(30)
    assert device.size == 8 * MIB


def test_what_the_config_says_is_not_forgotten_for_a_resize_that_is_refused(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.configure("moves", options={"size": 8 * MIB})
    hosts.worker(1).send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    hosts.reload()
    hosts.let_pass(0.1)
    controller.resize("moves", 6 * MIB, answers.append)
    hosts.worker(1).send_signal(signal.SIGCONT)
    assert str(answers) == str([OSError(errno.EBUSY, "disk moves is being resized")])
    hosts.service.die()
    hosts.let_pass(30)
    assert device_of(hosts, "moves").size == 8 * MIB


def test_what_the_config_says_is_not_forgotten_for_a_resize_that_fails(
    hosts: Hosts, controller: Controller
) -> None:
    """Neither is what failed tried again: who asked for it was told."""
    hosts.refuse_growth("moves")
    answers: list[Exception | None] = []
    controller.resize("moves", 6 * MIB, answers.append)
    hosts.let_pass(1)
    assert str(answers) == str([OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
    hosts.host.store.sizes_max["moves"] = 7 * MIB
    hosts.let_pass(10)
    assert device_of(hosts, "moves").size == MIB
    hosts.host.store.sizes_max["moves"] = 8 * MIB
    hosts.reload()
    hosts.let_pass(10)
    assert device_of(hosts, "moves").size == 8 * MIB


def test_what_the_config_takes_back_is_not_asked_for_again(
    hosts: Hosts, controller: Controller
) -> None:
    """Nor does it undo what an operator asked for after that."""
    hosts.host.store.sizes_max["moves"] = 4 * MIB
    for size in (8 * MIB, MIB):
        hosts.configure("moves", options={"size": size})
        hosts.reload()
        hosts.let_pass(1)
    hosts.host.store.sizes_max["moves"] = 8 * MIB
    answers: list[Exception | None] = []
    controller.stop("moves", answers.append)
    controller.start("moves", answers.append)
    hosts.let_pass(10)
    assert device_of(hosts, "moves").size == MIB
    controller.resize("moves", MIB // 2, answers.append)
    hosts.let_pass(1)
    hosts.reload()
    hosts.service.die()
    hosts.let_pass(30)
    assert device_of(hosts, "moves").size == MIB // 2


def test_what_the_config_takes_back_before_it_can_be_is_not_done(hosts: Hosts) -> None:
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: hosts.states()["moves"] == "starting")
    for size in (8 * MIB, MIB):
        hosts.configure("moves", options={"size": size})
        hosts.reload()
        hosts.let_pass(0.05)
    hosts.let_pass(20)
    assert device_of(hosts, "moves").size == MIB


def test_a_reload_in_the_middle_of_a_cut_has_the_last_word(
    hosts: Hosts, controller: Controller
) -> None:
    controller.resize("plain", 8 * MIB, lambda _: None)
    hosts.let_pass(1)
    slow = hosts.worker(controller.disk("plain").cores[0])
    slow.send_signal(signal.SIGSTOP)
    controller.resize("plain", MIB // 2, lambda _: None)
    hosts.configure("plain", options={"size": 4 * MIB})
    hosts.reload()
    hosts.let_pass(0.5)
    slow.send_signal(signal.SIGCONT)
    hosts.let_pass(5)
    assert controller.disk("plain").size == 4 * MIB


def test_what_the_config_says_is_tried_again_after_a_stop_and_a_start_at_once(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.refuse_growth("plain")
    hosts.host.store.sizes_max["plain"] = 8 * MIB
    controller.stop("plain", lambda _: None)
    controller.start("plain", lambda _: None)
    hosts.let_pass(10)
    hosts.reload()
    hosts.let_pass(10)
    assert controller.disk("plain").size == 8 * MIB


def test_what_the_config_says_is_not_asked_for_again_when_a_resize_overruled_it(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.refuse_growth("moves")
    controller.resize("moves", 2 * MIB, lambda _: None)
    hosts.let_pass(1)
    hosts.host.store.sizes_max["moves"] = 8 * MIB
    hosts.reload()
    hosts.service.die()
    hosts.let_pass(30)
    assert device_of(hosts, "moves").size == 2 * MIB


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4])
def test_what_the_config_says_is_not_forgotten_for_a_stop_in_its_middle(
    hosts: Hosts, controller: Controller, milliseconds: int
) -> None:
    hosts.configure("plain", options={"size": 8 * MIB})
    hosts.reload()
    hosts.let_pass(milliseconds / 1000)
    controller.stop("plain", lambda _: None)
    hosts.let_pass(10)
    controller.start("plain", lambda _: None)
    hosts.let_pass(10)
    assert controller.disk("plain").size == 8 * MIB


@pytest.mark.parametrize("anew", [False, True], ids=["in place", "anew"])
def test_a_disk_that_cannot_grow_serves_on_whatever_happens(
    hosts: Hosts, controller: Controller, *, anew: bool
) -> None:
    hosts.refuse_growth("plain", **({"timeout": 7} if anew else {}))
    assert hosts.reasons()["plain"] == "has yet to grow to 8388608 bytes"
    answers: list[Exception | None] = []
    controller.stop("plain", answers.append)
    hosts.let_pass(10)
    controller.start("plain", answers.append)
    hosts.let_pass(10)
    assert answers == [None, None]
    hosts.service.die()
    hosts.let_pass(30)
    assert hosts.states()["plain"] == "online"
    hosts.host.store.sizes_max["plain"] = 8 * MIB
    controller = hosts.service.controller
    assert controller is not None
    controller.reload(answers.append)
    hosts.let_pass(1)
    assert controller.disk("plain").size == 8 * MIB
    assert hosts.reasons()["plain"] == ""


@pytest.mark.parametrize("crash", [False, True], ids=["reload", "crash"])
def test_a_size_that_no_storage_has_yet_is_the_one_that_the_config_says(
    hosts: Hosts, *, crash: bool
) -> None:
    hosts.host.store.sizes_max["new"] = 4 * MIB
    disks = hosts.service.config
    for size in (8 * MIB, MIB):
        hosts.service.config = (*disks, DiskSpec("new", "malloc", {"size": size}, core=1))
        if crash and size == MIB:
            hosts.service.die()
        elif hosts.service.controller is not None:
            hosts.reload()
        hosts.let_pass(10)
    assert hosts.service.controller is not None
    assert hosts.states()["new"] == "online"
    assert hosts.service.controller.disk("new").size == MIB


@pytest.mark.parametrize("reloads", [1, 5])
def test_a_growth_is_tried_once_however_often_the_config_is_read_meanwhile(
    hosts: Hosts, caplog: pytest.LogCaptureFixture, reloads: int
) -> None:
    hosts.host.store.sizes_max["plain"] = 4 * MIB
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: hosts.states()["plain"] == "starting")
    hosts.configure("plain", options={"size": 8 * MIB})
    for _ in range(reloads):
        hosts.reload()
        hosts.let_pass(0.01)
    hosts.let_pass(20)
    assert caplog.text.count("disk plain keeps its size") == 1


@pytest.mark.parametrize("keep", [False, True], ids=["crash", "restart"])
def test_what_the_config_takes_back_while_nothing_runs_is_not_done(
    hosts: Hosts, controller: Controller, *, keep: bool
) -> None:
    hosts.refuse_growth("moves")
    hosts.configure("moves", options={"size": MIB})
    hosts.host.store.sizes_max["moves"] = 8 * MIB
    if keep:
        hosts.service.change(on_exit="keep")
        controller.shut_down(keep=True)
    else:
        hosts.service.die()
    hosts.let_pass(60)
    assert hosts.states()["moves"] == "online"
    assert device_of(hosts, "moves").size == MIB


def test_a_size_that_is_read_while_a_disk_is_opened_for_the_first_time_is_had_then(
    hosts: Hosts, controller: Controller
) -> None:
    disks = hosts.service.config
    hosts.worker(1).send_signal(signal.SIGSTOP)
    for size in (MIB, 8 * MIB):
        hosts.service.config = (*disks, DiskSpec("new", "malloc", {"size": size}, core=1))
        hosts.reload()
        hosts.let_pass(0.3)
    hosts.worker(1).send_signal(signal.SIGCONT)
    hosts.let_pass(10)
    assert controller.disk("new").size == 8 * MIB


def test_what_is_yet_to_be_is_tried_again_when_nothing_was_saved(hosts: Hosts) -> None:
    hosts.refuse_growth("moves")
    hosts.service.die()
    hosts.host.saved = None
    hosts.let_pass(30)
    assert hosts.service.controller is not None
    hosts.host.store.sizes_max["moves"] = 8 * MIB
    hosts.reload()
    hosts.let_pass(10)
    assert device_of(hosts, "moves").size == 8 * MIB


def test_a_disk_that_is_stopped_does_not_fail_for_a_size_that_it_is_to_have(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.host.store.sizes_max["plain"] = 4 * MIB
    controller.stop("plain", lambda _: None)
    hosts.let_pass(10)
    hosts.configure("plain", options={"size": 8 * MIB})
    hosts.reload()
    answers: list[Exception | None] = []
    controller.start("plain", answers.append)
    hosts.let_pass(10)
    assert answers == [None]
    assert controller.disk("plain").size == MIB


def test_a_disk_whose_storage_was_removed_waits_for_a_start(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.refuse_growth("plain")
    storage = hosts.host.store.find(controller.disk("plain").spec)
    assert storage is not None
    hosts.worker(1).worker.remove_storage(storage, "it is gone")
    hosts.let_pass(5)
    assert hosts.states()["plain"] == "removed"
    hosts.reload()
    hosts.let_pass(5)
    assert hosts.states()["plain"] == "removed"


@pytest.mark.parametrize("anew", [False, True], ids=["in place", "anew"])
def test_a_resize_that_ends_while_another_key_changes_overrules_the_size_of_before(
    hosts: Hosts, controller: Controller, *, anew: bool
) -> None:
    hosts.finish_applications()
    hosts.refuse_growth("plain")
    hosts.worker(1).send_signal(signal.SIGSTOP)
    answers: list[Exception | None] = []
    controller.resize("plain", MIB // 2, answers.append)
    hosts.let_pass(0.2)
    change = {"timeout": 7} if anew else {"listen": (Address("unix", "/run/other.sock"),)}
    hosts.configure("plain", **change)
    hosts.reload()
    hosts.worker(1).send_signal(signal.SIGCONT)
    hosts.let_pass(5)
    hosts.host.store.sizes_max["plain"] = 8 * MIB
    hosts.reload()
    hosts.let_pass(5)
    assert answers == [None]
    assert controller.disk("plain").size == MIB // 2


@pytest.mark.parametrize(("disk", "kill"), [("moves", True), ("plain", False)])
def test_a_size_that_cannot_be_had_fails_nothing_when_nothing_was_saved(
    hosts: Hosts, controller: Controller, disk: str, *, kill: bool
) -> None:
    hosts.refuse_growth(disk)
    hosts.service.die()
    hosts.host.saved = None
    hosts.await_true(lambda: hosts.service.controller not in (None, controller))
    successor = hosts.service.controller
    assert successor is not None
    hosts.await_true(lambda: successor.disk(disk).size == MIB)
    if kill:
        hosts.worker(1).send_signal(signal.SIGKILL)
    else:
        successor.stop(disk, lambda _: None)
        hosts.let_pass(20)
        successor.start(disk, lambda _: None)
    hosts.let_pass(30)
    assert hosts.states()[disk] == "online"
    assert successor.disk(disk).size == MIB

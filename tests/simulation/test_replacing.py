"""A disk is made anew by its config, or another takes its place: which size that has."""

from __future__ import annotations

import signal

import pytest

from reactor.control.controller import Controller
from reactor.spec import Address, DiskSpec
from tests.simulation.hosts import MIB, Hosts, device_of


@pytest.mark.parametrize("crash", [False, True], ids=["reload", "crash"])
@pytest.mark.parametrize("anew", [False, True], ids=["in place", "anew"])
@pytest.mark.parametrize("size", [MIB // 2, 4 * MIB], ids=["cut", "grow"])
def test_a_resize_is_not_undone_as_another_key_of_the_config_changes(
    hosts: Hosts,
    controller: Controller,
    on_a_device: None,
    *,
    size: int,
    anew: bool,
    crash: bool,
) -> None:
    hosts.finish_applications()
    hosts.host.store.find(controller.disk("moves").spec).size = 8 * MIB
    answers: list[Exception | None] = []
    controller.resize("moves", size, answers.append)
    hosts.let_pass(1)
    assert answers == [None]
    change = {"timeout": 7} if anew else {"listen": (Address("unix", "/run/other.sock"),)}
    hosts.configure("moves", **change)
    if crash:
        hosts.service.die()
    else:
        controller.reload(answers.append)
    hosts.let_pass(30)
    assert hosts.states()["moves"] == "online"
    assert device_of(hosts, "moves").size == size


@pytest.mark.parametrize("seconds", [0.1, 10])
def test_what_is_yet_to_be_is_not_forgotten_for_a_disk_that_is_made_anew(
    hosts: Hosts, controller: Controller, seconds: float
) -> None:
    hosts.refuse_growth("plain")
    controller.stop("plain", lambda _: None)
    hosts.let_pass(seconds)
    hosts.configure("plain", timeout=7)
    hosts.reload()
    hosts.let_pass(seconds)
    hosts.host.store.sizes_max["plain"] = 8 * MIB
    controller.start("plain", lambda _: None)
    hosts.let_pass(10)
    hosts.reload()
    hosts.let_pass(10)
    assert controller.disk("plain").size == 8 * MIB


def test_a_cut_that_is_refused_is_not_done_by_what_takes_the_place_of_the_disk(
    hosts: Hosts, controller: Controller, on_a_device: None
) -> None:
    answers: list[Exception | None] = []
    leader = hosts.refuse_cut(answers.append)
    hosts.configure("wide", timeout=7)
    hosts.reload()
    leader.send_signal(signal.SIGCONT)
    hosts.let_pass(20)
    assert answers != [None]
    assert hosts.states()["wide"] == "online"
    assert controller.disk("wide").size == MIB


@pytest.mark.parametrize("disk", ["plain", "moves"])
@pytest.mark.parametrize("seconds", [0, 0.002, 0.05])
def test_a_disk_that_is_taken_out_and_put_back_larger_has_its_new_size(
    hosts: Hosts, controller: Controller, disk: str, seconds: float
) -> None:
    hosts.finish_applications()
    disks = hosts.service.config
    hosts.service.config = tuple(spec for spec in disks if spec.name != disk)
    hosts.reload()
    hosts.let_pass(seconds)
    hosts.service.config = disks
    hosts.configure(disk, options={"size": 8 * MIB})
    hosts.reload()
    hosts.let_pass(30)
    assert controller.disk(disk).size == 8 * MIB


@pytest.mark.parametrize("crash", [False, True], ids=["reload", "crash"])
def test_a_disk_that_is_removed_has_the_size_of_its_next_config(
    hosts: Hosts, controller: Controller, *, crash: bool
) -> None:
    hosts.finish_applications()
    hosts.worker(1).send_signal(signal.SIGSTOP)
    controller.remove("moves", lambda _: None)
    hosts.let_pass(0.1)
    hosts.configure("moves", options={"size": 8 * MIB})
    if crash:
        hosts.service.die()
    else:
        hosts.reload()
    hosts.let_pass(0.5)
    hosts.worker(1).send_signal(signal.SIGCONT)
    hosts.let_pass(30)
    assert device_of(hosts, "moves").size == 8 * MIB


@pytest.mark.parametrize(
    ("second", "third"), [(("/b", 80), ("/b", 4)), (("/b", 8), ("/a", 8))], ids=["typo", "back"]
)
def test_storage_that_is_corrected_before_it_is_opened_has_the_size_that_was_read_last(
    hosts: Hosts, controller: Controller, second: tuple[str, int], third: tuple[str, int]
) -> None:
    hosts.host.store.sizes_max["new"] = 16 * MIB
    disks = hosts.service.config
    for (path, size), seconds in ((("/a", 1), 10), (second, 0), (third, 60)):
        options = {"path": path, "size": size * MIB}
        hosts.service.config = (*disks, DiskSpec("new", "file", options, core=1))
        hosts.reload()
        hosts.let_pass(seconds)
    assert hosts.states()["new"] == "online"
    assert controller.disk("new").size == third[1] * MIB


@pytest.mark.parametrize("crash", [False, True], ids=["reload", "crash"])
def test_a_disk_that_names_no_size_has_that_of_its_file(hosts: Hosts, *, crash: bool) -> None:
    disks = hosts.service.config
    made = {"new": {"path": "/a", "size": 8 * MIB}, "other": {"path": "/b", "size": 4 * MIB}}
    for files in (made, {"new": {"path": "/a"}}, {"new": {"path": "/b"}}):
        more = (DiskSpec(name, "file", options, core=1) for name, options in files.items())
        hosts.service.config = (*disks, *more)
        if crash:
            hosts.service.die()
        else:
            hosts.reload()
        hosts.let_pass(20)
    assert hosts.states()["new"] == "online"
    assert hosts.reasons()["new"] == ""
    assert hosts.service.controller is not None
    assert hosts.service.controller.disk("new").size == 4 * MIB


def test_another_way_to_the_same_file_changes_no_size(
    hosts: Hosts, controller: Controller, on_a_device: None
) -> None:
    disks, options = hosts.service.config, {"path": "/a", "size": 4 * MIB}
    hosts.service.config = (*disks, DiskSpec("new", "file", options, core=1))
    hosts.reload()
    hosts.let_pass(10)
    answers: list[Exception | None] = []
    controller.resize("new", 2 * MIB, answers.append)
    hosts.let_pass(5)
    options = {**options, "direct": True}
    hosts.service.config = (*disks, DiskSpec("new", "file", options, core=1))
    controller.reload(answers.append)
    hosts.let_pass(10)
    assert answers == [None, None]
    assert controller.disk("new").size == 2 * MIB


def test_what_is_to_grow_is_not_cut_as_somebody_else_has_made_it_larger(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.worker(1).send_signal(signal.SIGSTOP)
    hosts.configure("moves", options={"size": 6 * MIB})
    hosts.reload()
    hosts.let_pass(0.3)
    storage = hosts.host.store.find(controller.disk("moves").spec)
    assert storage is not None
    storage.size = 8 * MIB
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(20)
    assert hosts.states()["moves"] == "online"
    assert storage.size == controller.disk("moves").size == 8 * MIB
    assert hosts.reasons()["moves"] == ""


def test_a_disk_that_is_put_back_and_corrected_has_the_size_that_was_read_last(
    hosts: Hosts, controller: Controller
) -> None:
    disks = hosts.service.config
    hosts.worker(1).send_signal(signal.SIGSTOP)
    for size in (0, 8 * MIB, 4 * MIB):
        hosts.service.config = disks
        hosts.configure("plain", options={"size": size})
        if not size:
            hosts.service.config = tuple(spec for spec in disks if spec.name != "plain")
        hosts.reload()
        hosts.let_pass(0.1)
    hosts.worker(1).send_signal(signal.SIGCONT)
    hosts.let_pass(20)
    assert controller.disk("plain").size == 4 * MIB


def test_what_a_start_refuses_can_be_taken_back(hosts: Hosts, controller: Controller) -> None:
    """Listeners and core came at once, as nobody served it: they go back, too."""
    before = controller.disk("moves").spec
    next(each for each in hosts.applications if each.disk == "moves").mounts = True
    hosts.let_pass(3)
    hosts.configure("moves", timeout=7, listen=(Address("unix", "/run/other.sock"),))
    hosts.die()
    hosts.let_pass(30)
    assert "stays as it was" in hosts.reasons()["moves"]
    hosts.configure("moves", timeout=before.timeout, listen=before.listen)
    hosts.reload()
    hosts.let_pass(10)
    assert hosts.states()["moves"] == "online"
    assert hosts.reasons()["moves"] == ""
    assert hosts.service.controller is not None
    (now,) = (w.disks["moves"].spec for w in hosts.workers() if "moves" in w.disks)
    assert now.listen == hosts.service.controller.disk("moves").spec.listen == before.listen

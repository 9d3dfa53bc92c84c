"""A disk of two workers does without the one that cannot open it in time, or now."""

from __future__ import annotations

import errno
import os
import signal

import pytest

from reactor.control.controller import Controller
from reactor.control.shares import REST_SECONDS
from reactor.messages import Message
from tests.simulation.hosts import MIB, Hosts
from tests.simulation.platform import SimulatedPlatform
from tests.simulation.processes import WorkerProcess
from tests.simulation.worker import ServedDisk

ONLINE = dict.fromkeys(("stays", "moves", "plain", "wide"), "online")
NO_MEMORY = os.strerror(errno.ENOMEM)


def test_one_that_never_answers_fails_nobody(hosts: Hosts, controller: Controller) -> None:
    serving = hosts.worker(0)
    assert serving.worker is not None
    wide = serving.worker.disks["wide"]
    hosts.worker(1).send_signal(signal.SIGKILL)
    wide.storage.hung = True
    hosts.let_pass(wide.spec.dead_timeout / 2)
    assert hosts.reasons()["wide"] == "served without core 1"
    hosts.let_pass(wide.spec.dead_timeout)
    wide.storage.hung = False
    hosts.await_states(**ONLINE)
    assert hosts.worker(0) is serving
    assert [worker for worker in hosts.workers() if "wide" in worker.disks] == [serving.worker]

    controller.start("wide", lambda _: None)
    hosts.await_true(lambda: all("wide" in worker.disks for worker in hosts.workers()))
    hosts.await_true(lambda: not hosts.reasons()["wide"])


def all_serve(hosts: Hosts) -> bool:
    return all("wide" in worker.disks for worker in hosts.workers())


def test_one_that_lacks_memory_for_a_while_takes_part_again(hosts: Hosts) -> None:
    hosts.host.faults.short = ("no memory to open a disk",)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(10)
    lacking = f"served without core 1: {NO_MEMORY}"
    assert (hosts.states()["wide"], hosts.reasons()["wide"]) == ("online", lacking)
    hosts.let_pass(500)
    hosts.host.faults.end()
    hosts.let_pass(REST_SECONDS + 20)
    assert all_serve(hosts)
    assert not hosts.reasons()["wide"]
    assert hosts.states() == {**ONLINE, "plain": "failed"}  # nobody has a device of that


def test_one_that_lacks_memory_for_long_is_done_without_until_a_start(
    hosts: Hosts, controller: Controller
) -> None:
    for name in ("moves", "plain"):  # which fail meanwhile
        next(a for a in hosts.applications if a.disk == name).finish()
    hosts.host.faults.short = ("no memory to open a disk",)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(650)
    hosts.host.faults.end()
    hosts.let_pass(120)
    lacking = f"served without core 1 until it is started again: {NO_MEMORY}"
    assert hosts.reasons()["wide"] == lacking
    controller.start("wide", lambda _: None)
    hosts.await_true(lambda: all_serve(hosts))


def lack_memory(hosts: Hosts, core: int) -> None:
    faults = hosts.host.faults
    faults.short, faults.short_core = ("no memory to open a disk",), core


def test_the_other_has_its_turn_while_one_lacks_memory(hosts: Hosts) -> None:
    lack_memory(hosts, 0)
    for core in (0, 1):
        hosts.worker(core).send_signal(signal.SIGKILL)
    hosts.let_pass(20)
    assert hosts.reasons()["wide"] == f"served without core 0: {NO_MEMORY}"
    assert disks_of(hosts, 1)["wide"].leads
    hosts.host.faults.end()
    hosts.let_pass(REST_SECONDS + 20)
    assert all_serve(hosts)
    assert disks_of(hosts, 0)["wide"].leads
    assert hosts.states() == ONLINE
    assert not disks_of(hosts, 1)["wide"].leads


@pytest.mark.parametrize("seconds", [300, 590, 603, 610])  # around the end of its patience
def test_one_that_dies_while_the_other_lacks_memory_is_followed_by_one_that_serves(
    hosts: Hosts, seconds: float
) -> None:
    next(a for a in hosts.applications if a.disk == "stays").finish()
    lack_memory(hosts, 0)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(seconds)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(20)
    assert disks_of(hosts, 1)["wide"].leads
    assert hosts.states()["wide"] == "online"


def test_a_disk_starts_where_there_is_memory(hosts: Hosts, controller: Controller) -> None:
    hosts.finish_applications()
    controller.stop("wide", lambda _: None)
    hosts.await_true(lambda: hosts.states()["wide"] == "stopped")
    lack_memory(hosts, 0)
    answers: list[Exception | None] = []
    controller.start("wide", answers.append)
    hosts.let_pass(15)
    assert answers == [None]
    controller.resize("wide", 2 * MIB, answers.append)
    hosts.let_pass(5)
    assert answers == [None, None]


def start_none_at(core: int, monkeypatch: pytest.MonkeyPatch) -> None:
    launch = SimulatedPlatform.launch

    def launch_elsewhere(platform: SimulatedPlatform, where: int) -> WorkerProcess:
        if where == core:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return launch(platform, where)

    monkeypatch.setattr(SimulatedPlatform, "launch", launch_elsewhere)


def lose_both(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kill both workers; for 12 s core 0 lacks memory, and that of core 1 cannot be started."""
    start_none_at(1, monkeypatch)
    for core in (0, 1):
        hosts.worker(core).send_signal(signal.SIGKILL)
    lack_memory(hosts, 0)
    hosts.let_pass(12)
    hosts.host.faults.end()


def test_who_rested_serves_where_the_other_cannot_be_started(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    lose_both(hosts, monkeypatch)
    hosts.let_pass(30)
    assert disks_of(hosts, 0)["wide"].leads
    assert hosts.reasons()["wide"] == "served without core 1"


def test_who_rested_writes_back_where_the_other_cannot_be_started(
    hosts: Hosts, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts.finish_applications()
    answers: list[Exception | None] = []
    hosts.world.after(0.1, lambda: controller.stop("wide", answers.append))
    lose_both(hosts, monkeypatch)
    hosts.let_pass(60)
    assert answers == [None]


def disks_of(hosts: Hosts, core: int) -> dict[str, ServedDisk]:
    worker = hosts.worker(core).worker
    assert worker is not None
    return worker.disks


def stop_wide(hosts: Hosts, controller: Controller) -> list[Exception | None]:
    """Stop the disk; returns the answers, to which others may be added."""
    hosts.finish_applications()
    answers: list[Exception | None] = []
    controller.stop("wide", answers.append)
    hosts.await_true(lambda: answers == [None])
    return answers


def block_at_the_next_start(hosts: Hosts, controller: Controller, core: int) -> WorkerProcess:
    """Kill the worker of the core; the next one waits for a medium as it is told to open disks."""
    hosts.worker(core).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: controller.workers()[core].state == "starting")
    hosts.await_true(lambda: controller.workers()[core].state == "running")
    blocked = hosts.worker(core)
    blocked.block()
    return blocked


def test_a_medium_that_keeps_one_from_opening_it_keeps_not_the_other(
    hosts: Hosts, controller: Controller
) -> None:
    blocked = block_at_the_next_start(hosts, controller, 1)
    hosts.let_pass(15)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(20)
    assert hosts.states()["wide"] == "online"
    assert "wide" in disks_of(hosts, 0)
    blocked.unblock()
    hosts.await_true(lambda: all_serve(hosts))
    assert hosts.worker(1) is blocked


def test_a_medium_that_keeps_one_from_opening_it_keeps_no_connection_of_the_other(
    hosts: Hosts, controller: Controller
) -> None:
    next(a for a in hosts.applications if a.disk == "stays").finish()
    block_at_the_next_start(hosts, controller, 0)
    hosts.let_pass(5)
    storage = disks_of(hosts, 1)["wide"].storage
    storage.hung = True
    hosts.let_pass(25)  # longer than the kernel waits for an answer
    storage.hung = False
    application = next(a for a in hosts.applications if a.disk == "wide")
    hosts.await_true(lambda: hosts.states()["wide"] == "online" and application.idle)


@pytest.mark.parametrize("operation", ["stop", "remove", "detach", "start"])
def test_a_medium_that_keeps_one_from_opening_it_keeps_nobody_waiting(
    hosts: Hosts, controller: Controller, operation: str
) -> None:
    hosts.finish_applications()
    device = controller.disk("wide").device
    block_at_the_next_start(hosts, controller, 0)
    hosts.let_pass(8)
    answers: list[Exception | None] = []
    getattr(controller, operation)(device if operation == "detach" else "wide", answers.append)
    hosts.let_pass(50)
    assert answers == [None]


def test_one_that_waits_for_a_medium_as_it_is_tried_again_takes_part_after_it(
    hosts: Hosts, controller: Controller
) -> None:
    lack_memory(hosts, 0)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(8)
    hosts.host.faults.end()
    blocked = hosts.worker(0)
    blocked.block()
    hosts.let_pass(REST_SECONDS + 60)
    assert controller.disk("wide").state == "online"
    blocked.unblock()
    hosts.let_pass(REST_SECONDS + 20)
    assert hosts.worker(0) is blocked
    assert all_serve(hosts)


def test_nobody_rests_when_the_one_that_serves_is_lost(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack_memory(hosts, 0)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(8)
    hosts.host.faults.end()
    start_none_at(1, monkeypatch)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(15)
    assert disks_of(hosts, 0)["wide"].leads


def test_it_is_said_why_nobody_serves(hosts: Hosts, monkeypatch: pytest.MonkeyPatch) -> None:
    lack_memory(hosts, 0)
    start_none_at(1, monkeypatch)
    for core in (0, 1):
        hosts.worker(core).send_signal(signal.SIGKILL)
    hosts.let_pass(10)
    for _ in range(60):
        hosts.let_pass(1)
        assert (hosts.states()["wide"], hosts.reasons()["wide"]) == ("starting", NO_MEMORY)


def test_one_that_serves_is_not_ended_for_what_it_has_yet_to_hear(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.finish_applications()
    opening = block_at_the_next_start(hosts, controller, 1)
    hosts.let_pass(2)
    serving = hosts.worker(0)
    serving.block()
    hosts.let_pass(10)
    opening.unblock()  # it opens the disk, of which the one that leads cannot hear
    hosts.let_pass(3)
    answers: list[Exception | None] = []
    controller.start("wide", answers.append)
    hosts.await_true(lambda: answers == [None])
    serving.unblock()
    hosts.await_true(lambda: disks_of(hosts, 0)["wide"].members == [1])
    assert (hosts.worker(0), hosts.worker(1)) == (serving, opening)


def test_one_that_closes_a_disk_is_not_ended_for_its_next_start(
    hosts: Hosts, controller: Controller
) -> None:
    hosts.finish_applications()
    block_at_the_next_start(hosts, controller, 0)
    hosts.let_pass(8)
    closing = hosts.worker(1)
    closing.send_signal(signal.SIGSTOP)
    controller.stop("wide", lambda _: None)
    hosts.world.after(1.0, closing.send_signal, signal.SIGCONT)
    hosts.let_pass(0.2)
    controller.start("wide", lambda _: None)
    hosts.let_pass(60)
    assert hosts.worker(1) is closing
    assert hosts.states()["wide"] == "online"


def test_nothing_is_cut_that_one_may_yet_open_as_it_was(
    hosts: Hosts, controller: Controller
) -> None:
    answers = stop_wide(hosts, controller)
    blocked = hosts.worker(0)
    blocked.block()
    controller.start("wide", answers.append)
    hosts.await_true(lambda: answers == [None, None])
    controller.resize("wide", MIB // 2, answers.append)
    hosts.await_true(lambda: len(answers) == 3)
    assert "may yet open it" in str(answers[2])
    blocked.unblock()
    hosts.await_true(lambda: all_serve(hosts))
    hosts.let_pass(2)
    controller.resize("wide", MIB // 2, answers.append)
    hosts.await_true(lambda: len(answers) == 4)
    assert answers[3] is None
    assert disks_of(hosts, 0)["wide"].storage.size == MIB // 2


def test_a_first_start_waits_for_one_that_is_silent_where_the_other_lacks_memory(
    hosts: Hosts, controller: Controller
) -> None:
    answers = stop_wide(hosts, controller)
    blocked = hosts.worker(0)
    lack_memory(hosts, 1)
    blocked.block()
    hosts.let_pass(6)
    controller.start("wide", answers.append)
    hosts.let_pass(15)
    blocked.unblock()
    hosts.await_true(lambda: answers == [None, None])
    assert disks_of(hosts, 0)["wide"].leads


def test_one_that_was_told_before_it_was_asked_what_it_has_opens_no_stopped_disk(
    hosts: Hosts, controller: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts.finish_applications()
    storage = disks_of(hosts, 1)["wide"].storage
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: controller.workers()[0].state == "starting")
    storage.hung = True  # so that its opening takes a while
    hosts.await_true(lambda: controller.workers()[0].state == "running")
    hosts.let_pass(0.5)
    opening = hosts.worker(0)
    assert opening.worker is not None
    inquire = opening.worker._inquire

    def pause(message: Message) -> None:  # until it was told again
        monkeypatch.setattr(opening.worker, "_inquire", inquire)
        opening.send_signal(signal.SIGSTOP)
        hosts.world.after(3.0, opening.send_signal, signal.SIGCONT)
        opening.run(lambda: inquire(message))

    monkeypatch.setattr(opening.worker, "_inquire", pause)
    opening.worker._events += 1  # as if something that it said was lost
    hosts.let_pass(8)
    opening.block()
    storage.hung = False
    hosts.let_pass(7)
    answers: list[Exception | None] = []
    controller.stop("wide", answers.append)
    hosts.let_pass(12)
    opening.unblock()
    hosts.await_true(lambda: answers == [None])
    hosts.let_pass(20)
    assert not any("wide" in worker.disks for worker in hosts.workers())

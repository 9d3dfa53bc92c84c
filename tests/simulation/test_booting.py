"""A worker that dies, or hangs, before its hello, or lacks memory right after it."""

from __future__ import annotations

import signal

import pytest

from tests.simulation.hosts import Hosts
from tests.simulation.processes import WorkerProcess

FAILING = "a worker dies as it boots"
UNABLE = "a worker cannot start"  # and says so by its exit status
OLD_LIMIT_SECONDS = 60.0  # in which it dies more often than one may that has come up
USED = ("stays", "moves", "wide")  # that have a device
ONLINE = dict.fromkeys((*USED, "plain"), "online")


def lose_worker(hosts: Hosts, core: int, why: str = FAILING) -> None:
    hosts.host.faults.short = (why,)
    hosts.worker(core).send_signal(signal.SIGKILL)


@pytest.mark.parametrize("why", [FAILING, UNABLE])
def test_devices_wait_for_one_that_cannot_boot(hosts: Hosts, why: str) -> None:
    lose_worker(hosts, 1, why)
    hosts.let_pass(10 * OLD_LIMIT_SECONDS - 60)
    assert hosts.states() == {
        **ONLINE,
        "moves": "starting",
        "plain": "starting",
        "wide": "starting",
    }
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)


def test_a_next_controller_waits_too(hosts: Hosts) -> None:
    lose_worker(hosts, 1)
    hosts.service.die()
    hosts.let_pass(OLD_LIMIT_SECONDS)
    assert "failed" not in hosts.states().values()
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)


@pytest.mark.parametrize("why", [FAILING, UNABLE])
def test_devices_of_the_dead_wait_for_workers_that_cannot_boot(hosts: Hosts, why: str) -> None:
    hosts.host.faults.short = (why,)
    hosts.die()
    hosts.let_pass(OLD_LIMIT_SECONDS)
    assert all(hosts.states()[name] == "starting" for name in USED)
    hosts.host.faults.end()
    hosts.await_true(lambda: all(hosts.states()[name] == "online" for name in USED))


def test_one_that_says_that_it_cannot_start_is_given_up_at_once_where_no_device_waits(
    hosts: Hosts,
) -> None:
    for name in USED:
        hosts.free(name)
    lose_worker(hosts, 1, UNABLE)
    hosts.let_pass(10)
    assert hosts.states()["plain"] == "failed"
    assert "cannot start" in hosts.reasons()["plain"]


def test_one_that_cannot_boot_is_given_up_when_no_device_waits_any_more(hosts: Hosts) -> None:
    for application in hosts.applications:
        application.finish()
    hosts.let_pass(5)
    lose_worker(hosts, 1)
    hosts.let_pass(620)
    failed = {"moves": "failed", "plain": "failed"}
    hosts.await_states(**{**ONLINE, **failed})
    assert "keeps dying" in hosts.reasons()["moves"]


def test_clients_alone_do_not_keep_one_that_cannot_boot(hosts: Hosts) -> None:
    for name in USED:
        hosts.free(name)
    lose_worker(hosts, 1)
    hosts.let_pass(OLD_LIMIT_SECONDS)
    assert hosts.states()["plain"] == "failed"


def test_deaths_before_the_hello_are_forgotten_with_it(hosts: Hosts) -> None:
    lose_worker(hosts, 1)
    hosts.let_pass(OLD_LIMIT_SECONDS)
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(1)
    hosts.await_states(**ONLINE)


def stopped_before_its_hello(hosts: Hosts, core: int) -> WorkerProcess:
    old = hosts.worker(core)
    old.send_signal(signal.SIGKILL)

    def booting() -> list[WorkerProcess]:
        processes = hosts.host.processes.values()
        return [p for p in processes if p.core == core and p is not old and p.worker is None]

    hosts.await_true(lambda: bool(booting()))
    (process,) = booting()
    process.send_signal(signal.SIGSTOP)
    return process


def test_one_that_hangs_before_its_hello_is_replaced_as_soon_as_another(
    hosts: Hosts, caplog: pytest.LogCaptureFixture
) -> None:
    hung = stopped_before_its_hello(hosts, 1)
    hosts.let_pass(16)
    assert hosts.signals(signal.SIGABRT, hung) == 1
    assert hosts.signals(signal.SIGKILL, hung) == 0, "it aborts, though it was stopped"
    assert f"(pid {hung.pid}) is silent for" in caplog.text
    hosts.await_states(**ONLINE)


def test_devices_wait_for_the_memory_of_their_connections(hosts: Hosts) -> None:
    hosts.host.faults.short = ("no memory for what is handed over",)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.let_pass(500)
    assert hosts.states()["plain"] == "online"
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)


def test_a_worker_that_cannot_even_refuse_is_followed_by_another(hosts: Hosts) -> None:
    dead = hosts.worker(0)
    hosts.host.faults.short = ("no memory to refuse what is handed over",)
    dead.send_signal(signal.SIGKILL)
    hosts.let_pass(300)
    assert sum("ends with status 4" in noted for noted in hosts.world.trace or ()) > 1
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)
    assert hosts.worker(0) is not dead


def test_a_start_without_device_is_answered_whoever_waited_before(hosts: Hosts) -> None:
    hosts.finish_applications()
    lose_worker(hosts, 1, UNABLE)
    hosts.let_pass(620)
    assert hosts.states()["plain"] == "failed"
    answers: list[Exception | None] = []
    assert hosts.service.controller is not None
    hosts.service.controller.start("plain", answers.append)
    hosts.let_pass(10)
    assert "cannot start" in str(answers)


def test_a_device_that_never_gets_the_memory_for_a_connection_fails_in_the_end(
    hosts: Hosts,
) -> None:
    hosts.finish_applications()
    hosts.host.faults.short = ("no memory for what is handed over",)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(580)
    assert hosts.states()["stays"] == "starting"
    hosts.let_pass(40)
    assert hosts.states()["stays"] == "failed"
    assert "lost its connection" in hosts.reasons()["stays"]


def test_a_service_whose_devices_get_no_connections_ends(hosts: Hosts) -> None:
    hosts.finish_applications()
    hosts.host.faults.short = ("no memory for what is handed over",)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(30)
    assert hosts.service.controller is not None
    hosts.service.restarts = False
    hosts.service.controller.shut_down()
    hosts.let_pass(130)
    assert hosts.service.stopped


def test_a_device_that_comes_as_its_worker_dies_is_waited_for(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = hosts.service.controller
    assert controller is not None
    hosts.free("moves")
    hosts.free("wide")
    monkeypatch.setattr(hosts.host.faults, "call_seconds", lambda: 0.03)  # until its end is known
    controller.attach("plain", "/dev/nbd3", lambda _: None)
    hosts.host.faults.short = (UNABLE,)
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: controller.disk("plain").device is not None)
    hosts.let_pass(30)
    assert hosts.states()["plain"] == "starting"
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)

"""A disk of two workers does without the one that cannot open it in time, or now."""

from __future__ import annotations

import errno
import os
import signal
from typing import Any

import pytest

from reactor.spec import DiskSpec
from tests.simulation.hosts import Hosts
from tests.simulation.worker import ServedDisk, Worker

ONLINE = dict.fromkeys(("stays", "moves", "plain", "wide"), "online")
NO_MEMORY = os.strerror(errno.ENOMEM)


def test_one_that_never_answers_fails_nobody(hosts: Hosts) -> None:
    controller, serving = hosts.service.controller, hosts.worker(0)
    assert controller is not None
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
    hosts.let_pass(30)
    assert hosts.reasons()["wide"] == f"served without core 1: {NO_MEMORY}"
    hosts.host.faults.end()
    hosts.await_states(**ONLINE)
    assert all_serve(hosts)


def test_the_other_has_its_turn_while_one_lacks_memory(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_it = ServedDisk.__init__

    def open_on_core_1(disk: ServedDisk, worker: Worker, spec: DiskSpec, **rest: Any) -> None:
        if worker.process.core == 0:
            raise OSError(errno.ENOMEM, NO_MEMORY)
        open_it(disk, worker, spec, **rest)

    with monkeypatch.context() as short:
        short.setattr(ServedDisk, "__init__", open_on_core_1)
        for core in (0, 1):
            hosts.worker(core).send_signal(signal.SIGKILL)
        hosts.let_pass(20)
        assert hosts.reasons()["wide"] == f"served without core 0: {NO_MEMORY}"
        assert disks_of(hosts, 1)["wide"].leads
    hosts.await_states(**ONLINE)
    assert all_serve(hosts)
    assert disks_of(hosts, 0)["wide"].leads
    assert not disks_of(hosts, 1)["wide"].leads


def disks_of(hosts: Hosts, core: int) -> dict[str, ServedDisk]:
    worker = hosts.worker(core).worker
    assert worker is not None
    return worker.disks


def test_a_medium_that_keeps_one_from_opening_it_keeps_not_the_other(
    hosts: Hosts, monkeypatch: pytest.MonkeyPatch
) -> None:
    controller = hosts.service.controller
    assert controller is not None
    hosts.worker(1).send_signal(signal.SIGKILL)
    hosts.await_true(lambda: controller.workers()[1].state == "starting")
    hosts.await_true(lambda: controller.workers()[1].state == "running")
    blocked = hosts.worker(1)  # it was told to open the disk, and has not heard of it yet
    blocked.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(blocked, "waits_for_medium", lambda: True)
    monkeypatch.setattr(blocked, "send_signal", lambda _: None)
    hosts.let_pass(15)
    hosts.worker(0).send_signal(signal.SIGKILL)
    hosts.let_pass(60)
    assert hosts.states()["wide"] == "online"
    assert "wide" in disks_of(hosts, 0)

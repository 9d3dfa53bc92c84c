"""A disk of two workers does without the one that cannot open it in time."""

from __future__ import annotations

import signal

from tests.simulation.hosts import Hosts


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
    hosts.await_states(stays="online", moves="online", plain="online", wide="online")
    assert hosts.worker(0) is serving
    assert [worker for worker in hosts.workers() if "wide" in worker.disks] == [serving.worker]

    controller.start("wide", lambda _: None)
    hosts.await_true(lambda: all("wide" in worker.disks for worker in hosts.workers()))
    hosts.await_true(lambda: not hosts.reasons()["wide"])

"""What tests that tell what happens have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from reactor.control.controller import Controller
from reactor.spec import DiskSpec
from tests.simulation.hosts import MIB, Hosts
from tests.simulation.worker import ServedDisk, Worker

SEEDS = range(20)


@pytest.fixture(params=SEEDS)
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Hosts that differ in when things happen."""
    made = Hosts(request.param)
    yield made
    if made.service.platform is not None:
        made.service.platform.reactor.close()


@pytest.fixture
def controller(hosts: Hosts) -> Controller:
    """The controller that runs, until it dies."""
    assert hosts.service.controller is not None
    return hosts.service.controller


@pytest.fixture
def on_a_device(hosts: Hosts, controller: Controller, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker shows as much of it as it is told, however large it is."""
    open_it = ServedDisk.__init__

    def open_part(disk: ServedDisk, worker: Worker, spec: DiskSpec, **rest: Any) -> None:
        open_it(disk, worker, spec, **rest)
        disk.size = min(disk.size, spec.options["size"])

    monkeypatch.setattr(ServedDisk, "__init__", open_part)
    storage = hosts.host.store.find(controller.disk("wide").spec)
    assert storage is not None
    storage.size = 4 * MIB

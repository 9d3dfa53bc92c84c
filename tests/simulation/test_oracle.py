"""The simulation finds bugs: each of these is put in, and some seed must complain of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest

from reactor.control import link
from reactor.control.controller import Controller
from reactor.errors import DeviceError
from tests.simulation.devices import NetlinkDevice
from tests.simulation.platform import SimulatedPlatform
from tests.simulation.scenario import Scenario
from tests.simulation.worker import Connection

SEEDS = 1500

Patch = pytest.MonkeyPatch


def believe_in_every_reconnect(patch: Patch) -> None:
    """The kernel says that it is done also when it dropped the socket."""
    reconnect = NetlinkDevice.reconnect

    def believed(self: NetlinkDevice, *ends: Any) -> None:
        try:
            reconnect(self, *ends)
        except DeviceError:
            return

    patch.setattr(NetlinkDevice, "reconnect", believed)


def discard_what_the_successor_needs(patch: Patch) -> None:
    patch.setattr(Controller, "_is_succeeded", lambda *_: False)


def save_nothing(patch: Patch) -> None:
    patch.setattr(Controller, "_save", lambda _: None)


def do_what_the_dead_left(patch: Patch) -> None:
    """The kernel has sent it elsewhere, and something newer since."""

    def read(self: Connection) -> None:
        while self._end.side.inbox and not self.closed and not self._draining:
            message = self._end.side.inbox.popleft()
            if message is not None:
                self._begin(*message)
        if self._end.side.peer.closed:
            self.drain(0.5)

    patch.setattr(Connection, "_read", read)


def adopt_nothing(patch: Patch) -> None:
    patch.setattr(SimulatedPlatform, "adopt", lambda *_, **__: None)


def keep_the_sockets(patch: Patch) -> None:
    patch.setattr(link, "_drop", lambda _: None)


def hold_no_requests(patch: Patch) -> None:
    attach = SimulatedPlatform.attach

    def attached(self: SimulatedPlatform, *where: Any, **fields: Any) -> Any:
        return attach(self, *where, **{**fields, "dead_timeout": 0})

    patch.setattr(SimulatedPlatform, "attach", attached)


def take_nothing_over(patch: Patch) -> None:
    """A worker is asked for its disks, but what it says of them is not heard."""
    patch.setattr(Controller, "_on_hello", lambda *_: None)


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        (believe_in_every_reconnect, "lost its connection 200 times"),
        (discard_what_the_successor_needs, "was acknowledged|is discarded under"),
        (save_nothing, "is gone, not online"),
        (do_what_the_dead_left, "was acknowledged"),
        (adopt_nothing, "attached twice"),
        (keep_the_sockets, "sockets open"),
        (hold_no_requests, "an I/O error"),
        (take_nothing_over, "is discarded under"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[Patch], None], complaint: str
) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS):
        if any(re.search(complaint, wrong) for wrong in Scenario(seed).run()):
            return
    raise AssertionError(f"none of {SEEDS} seeds complains")

"""The simulation finds bugs: each of these is put in, and some seed must complain of it."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from reactor.attach.device import Device
from reactor.control import controller, link, saved, workers
from reactor.control.configured import Configured
from reactor.control.controller import Controller
from reactor.control.host import Host
from reactor.control.link import DeviceLink
from reactor.control.shares import Shares
from reactor.errors import DeviceError
from reactor.spec import DiskSpec
from tests.simulation import platform
from tests.simulation.platform import SimulatedPlatform
from tests.simulation.processes import WorkerProcess
from tests.simulation.scenario import Scenario
from tests.simulation.storage import Storage, Store

SEEDS = 12000

Patch = pytest.MonkeyPatch


def discard_what_the_successor_needs(patch: Patch) -> None:
    patch.setattr(Configured, "is_succeeded", lambda *_: False)


def save_nothing(patch: Patch) -> None:
    patch.setattr(Controller, "_save", lambda _: None)


def adopt_nothing(patch: Patch) -> None:
    patch.setattr(SimulatedPlatform, "adopt", lambda *_, **__: None)


def keep_the_sockets(patch: Patch) -> None:
    patch.setattr(link, "drop", lambda _: None)


def hold_no_requests(patch: Patch) -> None:
    attach = SimulatedPlatform.attach

    def attached(self: SimulatedPlatform, *where: Any, **fields: Any) -> Any:
        return attach(self, *where, **{**fields, "dead_timeout": 0})

    patch.setattr(SimulatedPlatform, "attach", attached)


def take_nothing_over(patch: Patch) -> None:
    """A worker is asked for its disks, but what it says of them is not heard."""
    patch.setattr(Controller, "_on_hello", lambda *_: None)


def save_after_the_answer(patch: Patch) -> None:
    """The next tick saves it."""
    patch.setattr(Controller, "_when_saved", lambda _, done: done)
    patch.setattr(
        controller, "Host", lambda platform, _, *rest: Host(platform, lambda: None, *rest)
    )


def tell_success_without_room(patch: Patch) -> None:
    patch.setattr(Controller, "_when_saved", lambda _, done: done)


def forget_former_cores(patch: Patch) -> None:
    """A disk that moved is opened while the worker that had it still does."""
    moved = saved._moved
    patch.setattr(saved, "_moved", lambda *args: replace(moved(*args), former=()))


def ask_nobody_what_it_has(patch: Patch) -> None:
    """A worker that lives is taken for one that has nothing open."""
    patch.setattr(Shares, "unknown", False)


def acknowledge_a_resize_at_once(patch: Patch) -> None:
    def resize(_: Shares, _size: int, then: Callable[[], None], _refused: Any) -> None:
        then()

    patch.setattr(Shares, "resize", resize)


def flush_nothing(patch: Patch) -> None:
    patch.setattr(Storage, "flush", lambda _: None)


def acknowledge_before_it_lands(patch: Patch) -> None:
    operate = WorkerProcess.operate

    def operate_later(
        self: WorkerProcess, storage: Storage, land: Callable[[], None], what: object
    ) -> None:
        before = dict(storage.blocks)
        land()
        written = {block: v for block, v in storage.blocks.items() if v != before.get(block)}
        storage.blocks = before
        operate(self, storage, lambda: storage.blocks.update(written), what)

    patch.setattr(WorkerProcess, "operate", operate_later)


def leave_nothing_as_it_was_found(patch: Patch) -> None:
    """A strict start that fails takes away what served somebody."""
    never = property(lambda _: False, lambda *_: None)
    patch.setattr(Controller, "_took_over", never, raising=False)


def blame_workers_for_a_pause(patch: Patch) -> None:
    """The controller's clock goes on while it is stopped, and one look is enough."""
    patch.setattr(platform, "WakingClock", lambda clock: clock)
    patch.setattr(workers, "AWAKE_LOOKS", 1)


def slip_a_config_under_a_device(patch: Patch) -> None:
    """What the config says now is served to who has the device of before."""

    def renewed(wish: saved.Wish, _: Any, now: dict[str, DiskSpec], *__: Any) -> saved.Wish:
        return replace(wish, spec=now.get(wish.spec.name, wish.spec))

    patch.setattr(saved, "_renewed", renewed)
    patch.setattr(DiskSpec, "identity", lambda _: "any")


def take_over_whatever_is_below(patch: Patch) -> None:
    """A device's tag does not say of which storage it is."""
    patch.setattr(DiskSpec, "identity", lambda _: "any")


def make_what_is_gone(patch: Patch) -> None:
    """A worker makes storage whether it was there once or not."""
    opened = Store.open

    def made(self: Store, *what: Any, least: int, **how: Any) -> Storage:
        return opened(self, *what, least=0 * least, **how)

    patch.setattr(Store, "open", made)


def forget_what_was_made(patch: Patch) -> None:
    """The next controller does not know that there was storage."""
    decode = saved.decode

    def forgot(*what: Any) -> saved.SavedState:
        state = decode(*what)
        return replace(state, wishes=[replace(wish, made=0) for wish in state.wishes])

    patch.setattr(saved, "decode", forgot)


def give_workers_up_too_soon(patch: Patch) -> None:
    patch.setattr(workers, "BACKOFF_SECONDS", (0.0, 0.1))


def open_within_seconds(patch: Patch) -> None:
    """A medium that hangs for longer fails the disk, whose device would wait."""
    open_next = Shares.open_next

    def open_soon(self: Shares, spec: DiskSpec, least: int, _: float = 0.0, **how: bool) -> None:
        open_next(self, spec, least, 4.0, **how)

    patch.setattr(Shares, "open_next", open_soon)


def take_devices_from_their_users(patch: Patch) -> None:
    """Who has mounted a device is not asked."""
    patch.setattr(SimulatedPlatform, "claims", lambda *_: [])


def fail_without_cause(patch: Patch) -> None:
    """A device that lost its connection twice is not worth the trouble."""

    def fail(self: DeviceLink, device: Device) -> bool:
        self._on_failed(DeviceError(errno.EIO, f"{device.path} lost its connection 2 times"))
        return True

    patch.setattr(link, "TRIES_AT_ONCE", 2)
    patch.setattr(DeviceLink, "_rests", fail)


@pytest.mark.parametrize(
    ("plant", "complaint"),
    [
        (discard_what_the_successor_needs, "was acknowledged|is discarded under"),
        (save_nothing, "is gone, not online|is online, not|as was acknowledged"),
        (adopt_nothing, "attached twice"),
        (keep_the_sockets, "sockets open"),
        (hold_no_requests, "an I/O error"),
        (take_nothing_over, "is discarded under"),
        (save_after_the_answer, "as was acknowledged|is online, not|is gone, not"),
        (tell_success_without_room, "as was acknowledged|is online, not|is gone, not"),
        (forget_former_cores, "opens null"),
        (ask_nobody_what_it_has, "opens null"),
        (acknowledge_a_resize_at_once, "as was acknowledged|, its storage|serves"),
        (flush_nothing, "was acknowledged"),
        (acknowledge_before_it_lands, "was acknowledged"),
        (leave_nothing_as_it_was_found, "an I/O error|was acknowledged|kept: False"),
        (blame_workers_for_a_pause, "never hung|did not finish"),
        (slip_a_config_under_a_device, "passes from|has blocks of|is readonly"),
        (take_over_whatever_is_below, "passes from|has blocks of|is readonly"),
        (make_what_is_gone, "is made anew|passes from"),
        (forget_what_was_made, "is made anew"),
        (give_workers_up_too_soon, "keeps dying|without need"),
        (open_within_seconds, "did not answer start|an I/O error"),
        (take_devices_from_their_users, "an I/O error"),
        (fail_without_cause, "lost its connection 2 times"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
@pytest.mark.timeout(900)
def test_a_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[Patch], None], complaint: str
) -> None:
    plant(monkeypatch)
    for seed in range(SEEDS):
        violations = Scenario(seed).run()
        misfits = [wrong for wrong in violations if "TypeError" in wrong]
        assert not misfits, "what is put in no longer fits where it is put"
        if any(re.search(complaint, wrong) for wrong in violations):
            return
    raise AssertionError(f"none of {SEEDS} seeds complains")

"""What a controller keeps for the next one, and what that one makes of it."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from reactor.control.plan import Machine, Placement
from reactor.control.runtime import RuntimeDir
from reactor.control.saved import (
    SavedState,
    Successor,
    Wish,
    decode,
    reconfigured,
    wishes_at_start,
)
from reactor.control.statefile import replace_file
from reactor.control.tags import disk, prefix, tag
from reactor.errors import ReactorError
from reactor.spec import Address, DiskSpec
from tests.shortages import few_descriptors, little_memory

MACHINE = Machine((0, 1), 2, lambda backend: True)
RAM = DiskSpec("ram", "malloc", {"size": 1 << 20}, uuid="6c55a2ac-b0a4-4d3e-bdf5-9d9c2f1a8a51")
FILE = DiskSpec(
    "file",
    "file",
    {"path": "/srv/a", "direct": True},
    device="/dev/nbd1",
    listen=(Address("unix", "/run/a.sock"), Address("tcp", "::1", 10809)),
    core=1,
    connections=2,
)


def wish(spec: DiskSpec, core: int = 0) -> Wish:
    return Wish(spec, Placement(core, (core,) * spec.connections))


def at_start(
    saved: SavedState, *now: DiskSpec, serving: tuple[int, ...] = (), machine: Machine = MACHINE
) -> list[Wish]:
    return wishes_at_start(saved, {spec.name: spec for spec in now}, serving, machine)


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (FILE, True),
        (FILE.with_size(1 << 30), True),
        (FILE.with_device("/dev/nbd7"), True),
        (replace(FILE, connections=1, timeout=3, core=None, listen=()), True),
        (replace(FILE, options={"path": "/srv/b", "direct": True}), False),
        (replace(FILE, backend="malloc"), False),
        (replace(FILE, readonly=True), False),
        (replace(FILE, block_size=4096), False),
        (replace(FILE, name="other"), False),
    ],
)
def test_a_device_is_found_again_only_for_the_same_storage(other: DiskSpec, is_same: bool) -> None:
    assert (tag("abc", other) == tag("abc", FILE)) == is_same
    assert disk(tag("abc", other)) == other.name
    assert tag("abc", other).startswith(prefix("abc"))


def test_a_device_that_another_release_attached_is_found() -> None:
    assert [tag("i", spec) for spec in (RAM, FILE)] == [
        "nbd-reactor:i:f087bb0b:ram",
        "nbd-reactor:i:e8d55246:file",
    ]


def test_an_outdated_state_does_not_know_how_much_there_was() -> None:
    state = SavedState((replace(wish(RAM), made=1 << 20), wish(FILE)))
    assert [each.made for each in state.outdated().wishes] == [1, 0]
    assert not state.outdated().complete


def test_what_the_kernel_holds_is_believed_before_an_outdated_state() -> None:
    now = replace(FILE, options={"path": "/srv/b"})
    going = replace(wish(FILE), desired="gone")
    saved = SavedState((going, wish(RAM)), {"file": Successor(now)}, {"file": FILE}, complete=False)
    held = saved.as_held([now, RAM], {tag("abc", now), tag("abc", RAM)})
    assert held.wishes == (replace(wish(now), made=1), wish(RAM))
    assert (held.successors, held.configured) == ({}, {"file": now})
    assert saved.as_held([now, RAM], {tag("abc", FILE)}) == saved


def test_what_came_after_an_outdated_state_was_not_removed() -> None:
    saved = SavedState((wish(RAM),), {}, {"ram": RAM, "file": FILE}, complete=False)
    held = saved.as_held([RAM, FILE], {tag("abc", FILE)})
    assert held == replace(saved, configured={"ram": RAM})
    (_, added) = at_start(held, RAM, FILE)
    assert added.spec == FILE


def test_what_was_saved_is_read() -> None:
    gone = Wish(FILE, Placement(1, (0, 1)), "gone", hot=True)
    successor = Successor(replace(FILE, core=None), "stopped")
    state = SavedState((replace(wish(RAM), due=2 << 20), gone), {"file": successor}, {"file": FILE})
    assert decode(state.encode("abc", "boot"), "abc", "boot") == state


def test_what_was_made_counts_until_the_host_is_booted_again() -> None:
    state = SavedState((replace(wish(RAM), made=1 << 20),))
    data = state.encode("abc", "boot")
    assert decode(data, "abc", "boot") == state
    assert decode(data, "abc", "another") == SavedState((wish(RAM),))


def test_a_state_that_does_not_say_what_was_made_is_read() -> None:
    state = SavedState((replace(wish(RAM), made=1 << 20),))
    text = state.encode("abc", "boot").partition(b"\n")[2].replace(b', "made": 1048576', b"")
    data = sha256(text.strip()).hexdigest().encode() + b"\n" + text
    assert decode(data, "abc", "boot") == SavedState((wish(RAM),))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: data[:-20], "torn"),
        (lambda data: data.replace(b"1048576", b"1048577"), "torn"),
        (lambda _: b"", "torn"),
        (lambda _: b"\0" * 100, "torn"),
    ],
)
def test_a_damaged_state_is_refused(change, problem: str) -> None:
    data = change(SavedState((wish(RAM),)).encode("abc", "boot"))
    with pytest.raises(ReactorError, match=problem):
        decode(data, "abc", "boot")


def test_the_state_of_another_service_is_refused() -> None:
    with pytest.raises(ReactorError, match="another service, abc"):
        decode(SavedState((wish(RAM),)).encode("abc", "boot"), "abd", "boot")


def test_a_state_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reactor.control.saved.VERSION", 2)
    data = SavedState().encode("abc", "boot")
    monkeypatch.undo()
    with pytest.raises(ReactorError, match="version 2, not 1"):
        decode(data, "abc", "boot")


def test_a_full_file_system_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")

    def full(_fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("spare", [0, 1])
def test_without_descriptors_the_old_state_stays(tmp_path: Path, spare: int) -> None:
    path = tmp_path / "state"
    replace_file(path, b"old")
    with (
        few_descriptors(os.getpid(), spare),
        pytest.raises(OSError, match="Too many open files"),
    ):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_first_start_has_the_disks_of_the_config() -> None:
    found = at_start(SavedState(), RAM, FILE)
    assert [(w.spec, w.placement.core, w.desired) for w in found] == [
        (RAM, 0, "online"),
        (FILE, 1, "online"),
    ]


def test_what_was_made_at_run_time_comes_back() -> None:
    saved = SavedState((wish(RAM, 1),), {}, {})
    assert at_start(saved) == [wish(RAM, 1)]


def test_what_was_removed_at_run_time_stays_away_until_its_config_changes() -> None:
    saved = SavedState((), {}, {"ram": RAM})
    assert at_start(saved, RAM) == []
    (found,) = at_start(saved, replace(RAM, readonly=True))
    assert found.spec.readonly


def test_a_changed_config_counts_for_a_disk_that_nobody_serves() -> None:
    saved = SavedState((wish(RAM),), {}, {"ram": RAM})
    changed = replace(RAM, listen=FILE.listen)
    assert at_start(saved, changed) == [wish(changed)]
    assert at_start(saved, changed, serving=(0,)) == [wish(RAM)], "a worker still has it so"


def test_a_disk_that_goes_is_not_changed() -> None:
    going = Wish(RAM, Placement(0, (0,)), "gone", hot=True)
    saved = SavedState((going,), {}, {"ram": RAM})
    assert at_start(saved, replace(RAM, readonly=True)) == [going]


def test_a_disk_of_a_core_that_is_gone_moves() -> None:
    pinned = replace(RAM, core=7)
    (found,) = at_start(SavedState((Wish(pinned, Placement(7, (7,))),)))
    assert found.placement.core in MACHINE.cores
    assert found.spec == RAM


@pytest.mark.parametrize(
    "changed",
    [
        replace(RAM, connections=2),
        replace(RAM, timeout=5),
        replace(RAM, dead_timeout=5),
        replace(RAM, readonly=True),
        replace(RAM, backend="null"),
        RAM.with_size(1 << 30),
    ],
)
def test_what_a_held_device_stands_on_is_changed_in_order(changed: DiskSpec) -> None:
    """Under the device another disk, or other timeouts, must not be slipped."""
    saved = SavedState((wish(RAM),), {}, {"ram": RAM})
    assert at_start(saved, changed) == [wish(RAM)]


def test_what_cannot_be_at_once_is_left_to_a_reload() -> None:
    address = Address("unix", "/run/x.sock")
    first, second = (
        DiskSpec(name, "null", {"size": 512}, listen=(address,), core=core)
        for name, core in (("a", 0), ("b", 1))
    )
    assert [wish.placement.core for wish in at_start(SavedState(), first, second)] == [0, 1]


def test_whatever_was_saved_can_be_started() -> None:
    """A disk that could not leave its device kept an address that its config gives to others."""
    here, there, astray = (
        replace(RAM, name=name, listen=FILE.listen[:1]) for name in ("a", "b", "c")
    )
    saved = SavedState((wish(here, 0), wish(there, 1), wish(astray, 7)))
    found = at_start(saved)
    assert [each.spec for each in found] == [here, there, astray]
    assert [each.placement.core for each in found[:2]] == [0, 1]
    assert found[2].placement.core in MACHINE.cores


@pytest.mark.parametrize(("run_time", "config", "size"), [(2, 1, 2), (2, 3, 3), (1, 2, 2)])
def test_a_size_given_at_run_time_stays_unless_the_config_names_another(
    run_time: int, config: int, size: int
) -> None:
    running = RAM.with_size(run_time << 20)
    now = reconfigured(running, RAM, replace(RAM.with_size(config << 20), readonly=True))
    assert now == replace(RAM, readonly=True).with_size(size << 20)


def test_a_device_given_at_run_time_stays_unless_the_config_names_another() -> None:
    running = RAM.with_device("/dev/nbd3")
    assert reconfigured(running, RAM, replace(RAM, readonly=True)).device == "/dev/nbd3"
    assert reconfigured(running, RAM, RAM.with_device("/dev/nbd4")).device == "/dev/nbd4"


def test_a_state_is_read_in_little_more_memory_than_it_has(tmp_path: Path) -> None:
    runtime = RuntimeDir(tmp_path / "run")
    saved = SavedState((wish(RAM), wish(FILE)))
    runtime.save(saved.encode(runtime.instance, runtime.boot))
    with little_memory(os.getpid(), 16 << 20):
        assert runtime.load() == saved
    runtime.close()

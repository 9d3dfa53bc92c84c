"""What the role's script does to the files of a host."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import ModuleType

import pytest

from tests.deploy.script import load


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its notes in `tmp_path`."""
    module = load("files", monkeypatch)
    monkeypatch.setattr(module, "CONFIG", tmp_path / "disks.yaml")
    monkeypatch.setattr(module, "RELEASES", tmp_path / "home/releases")
    monkeypatch.setattr(module, "TAKEN", tmp_path / "taken.json")
    monkeypatch.setattr(module, "MADE", tmp_path / "home/directories.json")
    monkeypatch.setattr(module, "SHARED", tmp_path / "share")
    return module


def test_files_and_links_are_placed_once(files: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "unit").write_text("first")
    copies = json.dumps({str(tmp_path / "etc/system/unit"): "unit"})
    links = json.dumps({str(tmp_path / "sbin/program"): "/opt/program"})
    both = [str(tmp_path / "sbin/program"), str(tmp_path / "etc/system/unit")]
    arguments = (str(tmp_path), copies, links)
    assert files.place(*arguments, "check") == both
    assert not (tmp_path / "sbin").exists()
    assert files.place(*arguments, "change") == both
    assert files.place(*arguments, "change") == []
    (tmp_path / "unit").write_text("second")
    assert files.place(*arguments, "change") == both[1:]
    assert (tmp_path / "etc/system/unit").read_text() == "second"
    assert (tmp_path / "etc/system/unit").stat().st_mode & 0o777 == 0o644
    assert (tmp_path / "sbin/program").readlink() == Path("/opt/program")
    (tmp_path / "unit").unlink()
    with pytest.raises(OSError, match="unit"):
        files.place(*arguments, "change")
    assert (tmp_path / "etc/system/unit").read_text() == "second"


def test_of_the_shared_directories_those_go_that_it_made(files: ModuleType, tmp_path: Path) -> None:
    share = tmp_path / "share"
    (share / "zsh/site-functions").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    names = ("zsh/site-functions/_it", "man/man5/it.5", "man/man8/it.8")
    links = {str(share / name): "/opt/it" for name in names}
    files.place(str(tmp_path), "{}", json.dumps(links), "change")
    (share / "man/man8/another.8").touch()
    files.remove(json.dumps([*links, str(tmp_path / "home")]), "change")
    left = [str(path.relative_to(share)) for path in sorted(share.rglob("*"))]
    assert left == ["man", "man/man8", "man/man8/another.8", "zsh", "zsh/site-functions"]


def test_what_was_made_is_removed_once(files: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "home/releases").mkdir(parents=True)
    (tmp_path / "home/releases/file").touch()
    (tmp_path / "unit").touch()
    (tmp_path / "link").symlink_to("home")
    (tmp_path / "dangling").symlink_to("nothing")
    made = [str(tmp_path / name) for name in ("dangling", "link", "unit", "home")]
    paths = json.dumps([*made, str(tmp_path / "other")])
    kept = sorted(tmp_path.rglob("*"))
    assert files.remove(paths, "check") == made
    assert sorted(tmp_path.rglob("*")) == kept
    assert files.remove(paths, "change") == made
    assert not any(os.path.lexists(path) for path in made)
    assert files.remove(paths, "change") == []


def test_a_release_that_is_removed_in_part_is_not_taken_for_a_whole_one(
    files: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor stays what a killed run has left beside a file."""
    mark, rest = (tmp_path / "home/releases/1" / name for name in ("installed", "lib"))
    mark.parent.mkdir(parents=True)
    for path in (mark, rest, tmp_path / ".unit.new", tmp_path / "unit"):
        path.touch()

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.shutil, "rmtree", die)
    paths = json.dumps([str(tmp_path / "unit"), str(tmp_path / "home")])
    with pytest.raises(KeyboardInterrupt):
        files.remove(paths, "change")
    assert rest.exists()
    assert not mark.exists()
    assert not (tmp_path / ".unit.new").exists()


def test_what_changed_since_the_service_took_it_is_untaken(
    files: ModuleType, tmp_path: Path
) -> None:
    unit, link = tmp_path / "unit", tmp_path / "current"
    names = json.dumps([str(unit), str(link)])
    assert files.untaken(names) == []  # a fresh host
    unit.write_text("first")
    link.symlink_to("one")
    assert files.untaken(names) == [str(unit), str(link)]
    files.taken(names)
    assert files.untaken(names) == []
    unit.write_text("second")
    assert files.untaken(names) == [str(unit)]
    files.taken(names)
    link.unlink()
    link.symlink_to("two")
    assert files.untaken(names) == [str(link)]


@pytest.mark.parametrize("runs", [False, True])
def test_a_service_that_was_made_by_hand_can_be_put_back(
    files: ModuleType, tmp_path: Path, *, runs: bool
) -> None:
    files.RUNS = ("true" if runs else "false",)
    unit, late = tmp_path / "unit", tmp_path / "late"
    names = json.dumps([str(unit), str(late)])
    unit.write_text("by hand")
    assert files.begin(names, "check") == [str(unit)]
    assert not files.TAKEN.exists()
    begun = [str(unit), str(late)] if runs else [str(unit)]
    assert files.begin(names, "change") == begun
    unit.write_text("second")
    late.touch()
    assert files.begin(names, "change") == [str(unit), str(late)]  # as an interrupted run left it
    assert files.restore() == ([str(unit), str(late)] if runs else None)
    assert unit.read_text() == ("by hand" if runs else "second")
    assert late.exists() != runs


def test_what_the_service_took_can_be_put_back(files: ModuleType, tmp_path: Path) -> None:
    unit, link, late = tmp_path / "unit", tmp_path / "current", tmp_path / "late"
    names = json.dumps([str(unit), str(link), str(late)])
    assert files.restore() is None  # nothing is noted
    unit.write_bytes(b"first \xff")
    unit.chmod(0o640)
    link.symlink_to("one")
    files.taken(names)
    assert files.restore() == []
    unit.write_text("second")
    link.unlink()
    link.symlink_to("two")
    late.touch()
    assert files.untaken(names) == [str(unit), str(link), str(late)]
    assert files.restore() == [str(unit), str(link), str(late)]
    assert unit.read_bytes() == b"first \xff"
    assert unit.stat().st_mode & 0o777 == 0o640
    assert link.readlink() == Path("one")
    assert not late.exists()
    assert files.TAKEN.stat().st_mode & 0o777 == 0o600  # it holds what only root may read
    assert files.untaken(names) == [str(unit), str(link), str(late)]  # until it runs with them
    files.taken(names)
    assert files.untaken(names) == []


def test_the_way_back_leaves_the_note_as_it_was(files: ModuleType, tmp_path: Path) -> None:
    unit = tmp_path / "unit"
    unit.write_text("first")
    files.CONFIG.write_text("first")
    restarts, names = json.dumps([str(unit)]), json.dumps([str(unit), str(files.CONFIG)])
    for step in (restarts, names):
        files.taken(step)
    noted = files.TAKEN.read_bytes()
    unit.write_text("second")
    files.restore()
    for step in (restarts, names):
        files.taken(step)
    assert files.TAKEN.read_bytes() == noted


def test_a_config_taken_in_part_is_neither_taken_nor_what_to_put_back(
    files: ModuleType, tmp_path: Path
) -> None:
    unit = tmp_path / "unit"
    unit.write_text("first")
    files.CONFIG.write_text("first")
    both = json.dumps([str(unit), str(files.CONFIG)])
    files.taken(both)
    for text in ("second", "third", "first"):
        files.CONFIG.write_text(text)
        files.taken(json.dumps([str(unit)]))
        assert files.untaken(both) == [str(files.CONFIG)]
    files.CONFIG.write_text("fourth")
    assert files.restore() == [str(files.CONFIG)]
    assert files.CONFIG.read_text() == "first"

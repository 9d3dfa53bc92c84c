"""What the role does to the files of a host, each in one step; prints JSON.

files.py place PREFIX COPIES LINKS MODE [path, ...] that it changed, or with MODE check would
files.py begin FILES MODE               notes what a service runs with that the role did not make,
                                        unless with MODE check; prints what `untaken` does
files.py untaken FILES                  files that are not as the service took them: [path, ...]
files.py taken FILES                    notes that the service took them as they are: null
files.py restore                        puts back what it took last: [path, ...] that was not so;
                                        null where nothing is noted
files.py remove PATHS MODE              [path, ...] that were there, and with MODE check still are

FILES and PATHS are JSON lists, COPIES and LINKS JSON objects: target to source.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CONFIG = Path("/etc/nbd-reactor/disks.yaml")
MODES = {CONFIG: 0o640}  # of what not all may read
MADE = Path("/opt/nbd-reactor/directories.json")  # [path, ...] below SHARED that were not there
RELEASES = Path("/opt/nbd-reactor/releases")
RUNS = ("systemctl", "is-active", "--quiet", "nbd-reactor.service", "nbd-reactor@*.service")
SHARED = Path("/usr/local/share")  # with other programs
TAKEN = Path("/opt/nbd-reactor/taken.json")  # path to content


def place(prefix: str, copies: str, links: str, mode: str) -> list[str]:
    """Copy and link what a release has for the host; return the targets that were not so."""
    changed = []
    contents = {
        target: Path(prefix, source).read_bytes() for target, source in json.loads(copies).items()
    }
    for target, source in json.loads(links).items():
        if not (Path(target).is_symlink() and str(Path(target).readlink()) == source):
            changed.append(target)
            if mode != "check":
                replace(Path(target), lambda new, source=source: new.symlink_to(source))
    for target, content in contents.items():
        if read(Path(target)) != content:
            changed.append(target)
            if mode != "check":
                replace(Path(target), lambda new, content=content: write(new, content))
    return changed


def replace(target: Path, make: Callable[[Path], object]) -> None:
    """Make a file beside the target, and put it in its place in one step."""
    os.umask(0o022)
    missing = [path for path in target.parents if SHARED in path.parents and not path.exists()]
    if missing:
        text = json.dumps([*made(), *map(str, missing)])
        replace(MADE, lambda new: write(new, text.encode()))
    target.parent.mkdir(parents=True, exist_ok=True)
    new = beside(target)
    new.unlink(missing_ok=True)
    make(new)
    new.replace(target)


def made() -> list[str]:
    """Return the shared directories that it made; none when the note is not there, or was torn."""
    with contextlib.suppress(ValueError, TypeError):
        return [*map(str, json.loads(read(MADE)))]
    return []


def beside(target: Path) -> Path:
    """Return where a file is made before it is put in its place."""
    return target.with_name(f".{target.name}.new")


def write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file that all may read, unless `mode` says otherwise."""
    path.write_bytes(content)
    path.chmod(mode)


def begin(files: str, mode: str) -> list[str]:
    """Note the files of a service that runs and of which nothing is noted; return `untaken`.

    Somebody made it by hand, and may have changed them since it was started.
    """
    names = json.loads(files)
    if mode != "check" and not notes()[0] and subprocess.run(RUNS, check=False).returncode == 0:
        note({name: content(Path(name)) for name in names}, names)
    return untaken(files)


def untaken(files: str) -> list[str]:
    """Return those that are not as the service took them."""
    noted, doubted = notes()
    return [
        name
        for name in json.loads(files)
        if name in doubted or content(Path(name)) != noted.get(name)
    ]


def taken(files: str) -> None:
    """Note what is in the files that the service runs by now.

    Of a config that is not among them it may have taken a part: the one before is still the one to
    put back, but `untaken` whatever is there.
    """
    now = {name: content(Path(name)) for name in json.loads(files)}
    before = {name: noted for name, noted in notes()[0].items() if name == str(CONFIG)}
    rest = {name: noted for name, noted in before.items() if name not in now}
    note(now | rest, [*rest])


def restore() -> list[str] | None:
    """Put back what the service took last, and return what that changed; None without notes.

    That it runs with it again is not sure: `untaken`, until it is `taken`.
    """
    all_noted, _ = notes()
    with contextlib.suppress(OSError):  # without room for it, to go back is what counts
        note(all_noted, [*all_noted])
    changed = []
    for name, noted in all_noted.items():
        path = Path(name)
        if content(path) == noted:
            continue
        changed.append(name)
        mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else MODES.get(path, 0o644)
        if noted is None:
            path.unlink()
        elif "link" in noted:
            replace(path, lambda new, target=noted["link"]: new.symlink_to(target))
        else:
            text = noted["text"].encode(errors="surrogateescape")
            replace(path, lambda new, text=text, mode=mode: write(new, text, mode))
    return changed if all_noted else None


def note(noted: dict[str, dict[str, str] | None], doubted: list[str]) -> None:
    """Keep the contents by path, and of which it is not sure that the service runs with them."""
    text = json.dumps({**noted, "doubted": doubted}, indent=1)
    replace(TAKEN, lambda new: write(new, text.encode(), 0o600))


def notes() -> tuple[dict[str, dict[str, str] | None], list[str]]:
    """Return what was kept; nothing when it is not there, or was torn."""
    with contextlib.suppress(ValueError):
        noted = dict(json.loads(read(TAKEN)))
        doubted = noted.pop("doubted", [])
        return noted, doubted
    return {}, []


def content(path: Path) -> dict[str, str] | None:
    """Return what is in a file, or where a link leads; None when it is not there."""
    if path.is_symlink():
        return {"link": str(path.readlink())}
    return {"text": read(path).decode(errors="surrogateescape")} if path.exists() else None


def remove(paths: str, mode: str) -> list[str]:
    """Remove files, links, and directories with all that is in them; return those there were.

    A directory where something is mounted is emptied, and stays.
    """
    found = [
        path
        for path in map(Path, json.loads(paths))
        if os.path.lexists(path) and not (path.is_mount() and not any(path.iterdir()))
    ]
    if mode == "check":
        return [*map(str, found)]
    for mark in RELEASES.glob("*/installed"):
        mark.unlink()  # first: of a release nothing is missing while it has its mark
    for path in map(Path, json.loads(paths)):
        beside(path).unlink(missing_ok=True)  # of a run that was killed
    for path in found:
        if path == MADE.parent:  # its note goes with it
            for directory in sorted(made(), key=len, reverse=True):
                with contextlib.suppress(OSError):  # it is gone, or somebody else's too by now
                    Path(directory).rmdir()
        empty(path)
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        elif not path.is_mount():
            path.rmdir()
    return [*map(str, found)]


def empty(path: Path) -> None:
    """Remove all that is in a directory; nothing where it is none."""
    for entry in path.iterdir() if path.is_dir() and not path.is_symlink() else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def read(path: Path) -> bytes:
    """Return what is in the file; nothing when it is not there."""
    return path.read_bytes() if path.is_file() else b""


if __name__ == "__main__":
    if os.geteuid() != 0:
        sys.exit("root is needed: run the play with become: true")
    steps: dict[str, Callable[..., object]] = {
        "place": place,
        "begin": begin,
        "untaken": untaken,
        "taken": taken,
        "restore": restore,
        "remove": remove,
    }
    try:
        print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
    except OSError as error:
        sys.exit(str(error))

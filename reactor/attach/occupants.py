"""Who uses an nbd device, in words for the operator. Looks only; opens no device.

What decides something raises OSError when it cannot be known.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from reactor.attach import sysfs
from reactor.errors import DeviceError, is_shortage

PROC: Final = Path("/proc")
TAG_PREFIX: Final = "nbd-reactor:"
NAMES_MAX: Final = 3  # how many processes a message names


def occupation(path: str, index: int) -> str:
    """Return one line that says why the device cannot be had, and what to do."""
    thread = sysfs.pid(index)
    if thread is None:
        openers = processes_with(path)
        if openers:
            return f"{path} is not attached, but is held open by {listed(openers)}"
        return f"{path} is in use"
    tag = sysfs.backend(index)
    if tag is not None and tag.startswith(TAG_PREFIX):
        used = users(path, index)
        by = f", and used by {listed(used)}" if used else ""
        return f"{path} is attached by nbd-reactor already, as {tag}{by}"
    owner = _process(thread)
    if owner is None and (used := users(path, index)):
        return f"{path} is attached already by a program that has ended, and used by {listed(used)}"
    if owner is None:
        free = f"if nobody needs it: nbd-client -d {path}"
        return f"{path} is attached already, by another program over netlink; {free}"
    return f"{path} is attached already, by {owner}"


def users(path: str, index: int) -> list[str]:
    """Return what stands on the device, and the processes that have it open."""
    return [*claims(path, index), *processes_with(path)]


def claims(path: str, index: int) -> list[str]:
    """Return what stands on the device: mounts, swap, stacked devices."""
    stacked = [f"/dev/{name}" for name in [*sysfs.holders(index), *loops(path)]]
    return [*(f"the mount {mount}" for mount in mounts(path)), *swap(path), *stacked]


def mounts(path: str) -> list[str]:
    """Return where the device or a partition of it is mounted."""
    return [fields[1] for fields in _table("self/mounts") if _is_device(fields[0], path)]


def swap(path: str) -> list[str]:
    """Return a word for each swap area on the device or a partition of it."""
    areas = [fields[0] for fields in _table("swaps") if _is_device(fields[0], path)]
    return [f"the swap on {area}" for area in areas]


def loops(path: str) -> list[str]:
    """Return the loop devices on the device or a partition of it: the kernel names no holder."""
    return [name for name, file in sysfs.loop_files() if _is_device(file, path)]


def processes_with(path: str) -> list[str]:
    """Return the processes that have the device or a partition of it open."""
    return [
        name
        for process in PROC.glob("[0-9]*")
        if any(_is_device(target, path) for target in _open_files(process))
        and (name := _process(int(process.name)))
    ]


def still_used(path: str, found: list[str]) -> DeviceError:
    """Return the error for a device that was disconnected under its users."""
    names = listed(found) or "somebody"
    message = f"{path} is disconnected, but stays in use until {names} lets it go"
    return DeviceError(errno.EBUSY, message)


def listed(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = len(names) - NAMES_MAX
    return ", ".join(names[:NAMES_MAX]) + (f" and {more} more" if more > 0 else "")


def _table(name: str) -> list[list[str]]:
    lines = (sysfs.text(PROC / name) or "").splitlines()
    return [line.split() for line in lines if line]


def _open_files(process: Path) -> Iterator[str]:
    try:
        for descriptor in (process / "fd").iterdir():
            try:
                yield str(descriptor.readlink())
            except OSError:
                continue
    except OSError as error:  # ended, or another user's
        if is_shortage(error):
            raise


def _process(thread: int) -> str | None:
    """Return name and id of the process that `thread` belongs to; None when it has ended."""
    try:
        status = (PROC / str(thread) / "status").read_text(errors="replace")
    except OSError:
        return None
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    group = fields.get("Tgid", str(thread))
    try:
        name = (PROC / group / "comm").read_text(errors="replace").strip()
    except OSError:
        name = fields.get("Name", "?")
    return f"{name} (pid {group})"


def _is_device(name: str, path: str) -> bool:
    return name == path or re.fullmatch(re.escape(path) + r"p[0-9]+", name) is not None

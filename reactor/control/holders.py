"""Which disk has a device, an address, or the storage that another wants."""

from __future__ import annotations

import errno
from collections.abc import Collection, Iterable, Mapping
from itertools import chain
from typing import Final

from backends import registry
from reactor.control.disk import DiskControl
from reactor.control.workers import WorkerProcess
from reactor.spec import Address, DiskSpec

DISKS_MAX: Final = 4096


def check_new(spec: DiskSpec, disks: Mapping[str, DiskControl]) -> None:
    """Raise OSError when there cannot be such a disk beside these."""
    if spec.name in disks:
        raise OSError(errno.EEXIST, f"there is a disk {spec.name} already")
    if len(disks) >= DISKS_MAX:
        raise OSError(errno.ENOSPC, f"there are {DISKS_MAX} disks already")
    if spec.device not in (None, "auto") and (name := holder(spec.device, disks.values())):
        raise OSError(errno.EEXIST, f"{spec.device} is in use by disk {name}")


def patience(disks: Mapping[str, DiskControl], worker: WorkerProcess) -> float:
    """Return for how many seconds who uses a device waits for the worker."""
    used = (disk for disk in disks.values() if disk.path is not None)
    shares = ((disk, disk.share(worker)) for disk in used)
    awaited = (d for d, share in shares if share and (share.rests or not share.given_up))
    return max((disk.spec.dead_timeout for disk in awaited), default=0.0)


def attach_refusal(disk: DiskControl) -> OSError | None:
    """Return why the disk cannot be attached to a device at run time, if it cannot."""
    if not disk.rising:
        return OSError(errno.ENODEV, f"disk {disk.spec.name} is {disk.state}")
    if disk.spec.device is not None or disk.path is not None or disk.wish.attaching:
        message = f"disk {disk.spec.name} is on {disk.path or disk.spec.device} already"
        return OSError(errno.EPERM, message)
    return None


def holder(device: str | None, disks: Collection[DiskControl]) -> str | None:
    """Return the name of the disk that is on `device`, or is meant for it."""
    # One that is letting go of it comes last: another may have it already.
    on_it = sorted((d for d in disks if d.path == device), key=_leaves_device)
    meant_for_it = (d for d in disks if d.spec.device == device != "auto")
    return next((disk.spec.name for disk in (*on_it, *meant_for_it)), None)


def _leaves_device(disk: DiskControl) -> bool:
    """Whether the disk is about to let go of its device."""
    return not disk.rising or disk.spec.device not in ("auto", disk.path)


def _awaits_device(disk: DiskControl) -> bool:
    """Whether the disk is about to attach a device that it names."""
    return disk.rising and disk.spec.device not in (None, "auto", disk.path)


def attach_hindrance(
    disk: DiskControl, disks: Iterable[DiskControl], coming: Iterable[DiskSpec]
) -> str:
    """Return what must happen before `disk` is attached, for the operator; empty: nothing.

    `coming`: what will take the place of other disks.
    """
    if disk.spec.device is None:
        return ""
    if disk.spec.device == "auto":
        # Whoever names its device goes first, or `auto` might take it.
        first = named_first(disks, coming)
        return f"waits for disk {first.name} to be on {first.device}" if first else ""
    for other in disks:
        if other.path == disk.spec.device and _leaves_device(other):
            return f"waits for disk {other.spec.name} to leave {other.path}"
    return ""


def named_first(disks: Iterable[DiskControl], coming: Iterable[DiskSpec]) -> DiskSpec | None:
    """Return one that is to be on a device that it names, and is not yet, if there is any."""
    naming = (spec for spec in coming if spec.device not in (None, "auto"))
    return next(chain(naming, (disk.spec for disk in disks if _awaits_device(disk))), None)


def hindrance(disk: DiskControl, disks: Iterable[DiskControl]) -> str:
    """Return what `disk` must wait for before it is opened, for the operator; empty: nothing.

    `disks`: at least all with one of its addresses or paths. Raises OSError EBUSY when another disk
    has its storage, and keeps it.
    """
    for other in disks:
        if other is disk:
            continue
        common = {*disk.spec.listen} & _left_addresses(other)
        if common and other.placement.core != disk.placement.core:
            return f"waits for disk {other.spec.name} to leave {min(map(str, common))}"
        leaves = other.desired == "gone" and not other.settled
        if not leaves and not (other.rising and _owning(other) > _owning(disk)):
            continue  # as nearly all: there may be thousands, and paths take time to compare
        path = common_path(disk.spec, other.spec)
        if path and leaves:
            return f"waits for disk {other.spec.name} to leave {path}"
        if path:
            raise OSError(errno.EBUSY, f"{path} is in use by disk {other.spec.name}")
    return ""


def _left_addresses(disk: DiskControl) -> set[Address]:
    """Return the addresses that the disk still has, and is about to let go."""
    return disk.addresses - {*(disk.spec.listen if disk.rising else ())}


def common_path(one: DiskSpec, other: DiskSpec) -> str:
    """Return the storage that both would have and one of them write to; empty if there is none."""
    if one.readonly and other.readonly:
        return ""
    first, second = (registry.paths(spec.backend, spec.options) for spec in (one, other))
    return min(first & second, default="")


def _owning(disk: DiskControl) -> tuple[bool, bool]:
    """Return what makes storage a disk's own: first its device, then that it had it open."""
    return disk.path is not None, disk.is_made

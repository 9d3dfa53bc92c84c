"""Which disk has a device, or an address."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from reactor.control.disk import DiskControl


def holder(device: str | None, disks: Collection[DiskControl]) -> str | None:
    """Return the name of the disk that is on `device`, or is meant for it."""
    # One that is letting go of it comes last: another may have it already.
    on_it = sorted((d for d in disks if d.path == device), key=lambda d: d.leaves_device)
    meant_for_it = (d for d in disks if d.spec.device == device != "auto")
    return next((disk.spec.name for disk in (*on_it, *meant_for_it)), None)


def may_listen(disk: DiskControl, disks: Iterable[DiskControl]) -> bool:
    """Whether no worker but its own has an address of `disk` for another that lets go of it."""
    wanted = {*disk.spec.listen}
    return not wanted or not any(
        other is not disk
        and wanted & other.left_addresses
        and other.placement.core != disk.placement.core
        for other in disks
    )

"""Telling that the service is up."""

from __future__ import annotations

from collections.abc import Sequence

from reactor.control.demo import tell_where
from reactor.control.notify import notify
from reactor.control.service import DiskStatus
from reactor.log import tell


def tell_ready(disks: Sequence[DiskStatus], workers: int, *, first: bool, demo: bool) -> None:
    """Tell the service manager, and the `first` time the user, how many disks are online."""
    online = sum(disk.state == "online" for disk in disks)
    failed = [disk.spec.name for disk in disks if disk.state == "failed"]
    line = f"ready: {online} of {len(disks)} disks on {workers} workers"
    if failed:
        line += f"; failed: {', '.join(failed)}"
    notify(f"READY=1\nSTATUS={line}")
    if first:
        tell(line)
    if first and demo:
        tell_where(disks)

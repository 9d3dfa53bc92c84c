"""How a disk becomes what the config says: in place, made anew, or not while it is in use."""

from __future__ import annotations

from collections.abc import Iterable

from reactor.attach.occupants import listed
from reactor.control.disk import DiskControl
from reactor.control.platform import Platform
from reactor.spec import DiskSpec


def fits(disk: DiskControl, spec: DiskSpec, others: Iterable[DiskControl]) -> bool:
    """Whether `disk` can become `spec` in place. Those with one address must have one worker."""
    new = {*spec.listen} - {*disk.spec.listen}
    return disk.can_become(spec) and not any(
        other is not disk and new & {*other.spec.listen} for other in others
    )


def obstacle(platform: Platform, disk: DiskControl, spec: DiskSpec, *, in_place: bool) -> str:
    """Return why `disk` must stay as it is now, for the operator; empty if it need not.

    Who has just opened the device, and neither mounted it nor put anything on it, is not asked.
    """
    path = disk.path
    elsewhere = spec.device not in ("auto", path)
    if path is None or (in_place and not elsewhere) or disk.state not in ("starting", "online"):
        return ""
    claims = platform.claims(path)
    if not claims:
        return ""
    keys = spec.differences(disk.spec)
    harmless = {"size", "listen"} if elsewhere else {"size", "listen", "device"}
    named = ", ".join([key for key in keys if key not in harmless] or keys)
    return (
        f"disk {spec.name} stays as it was: {path} is in use by {listed(claims)}, and would be"
        f" taken away for another {named}; end that use, then reload"
    )

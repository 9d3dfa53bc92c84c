"""Why a disk cannot become what the config says: its device would be taken from its users."""

from __future__ import annotations

from collections.abc import Sequence

from reactor.attach.occupants import listed
from reactor.control.disk import DiskControl
from reactor.control.holders import common_path
from reactor.control.platform import Platform
from reactor.spec import DiskSpec


def obstacle(
    platform: Platform,
    disk: DiskControl,
    spec: DiskSpec,
    kept: Sequence[DiskControl],
    *,
    in_place: bool,
) -> str:
    """Return why `disk` must stay as it is now, for the operator; empty if it need not.

    Who has just opened the device, and neither mounted it nor put anything on it, is not asked.
    `kept`: disks that must stay as they are.
    """
    elsewhere = spec.device not in ("auto", disk.path)
    if disk.state not in ("starting", "online") or (in_place and not elsewhere):
        return ""
    for other in kept:
        path = common_path(spec, other.spec)
        if path or (elsewhere and other.path == spec.device):
            return (
                f"disk {spec.name} stays as it was:"
                f" disk {other.spec.name} keeps {path or other.path}"
            )
    if disk.path is None:
        return ""
    keys = spec.differences(disk.spec)
    harmless = {"size", "listen"} if elsewhere else {"size", "listen", "device"}
    named = ", ".join([key for key in keys if key not in harmless] or keys or ["core"])
    return _in_use(platform, disk, f"would be taken away for another {named}")


def obstacle_to_removal(platform: Platform, disk: DiskControl) -> str:
    """Return why `disk` must stay, which the config has no more; empty if it need not."""
    if disk.path is None or disk.state not in ("starting", "online"):
        return ""
    return _in_use(platform, disk, "the config has the disk no more")


def _in_use(platform: Platform, disk: DiskControl, why: str) -> str:
    assert disk.path is not None
    claims = platform.claims(disk.path)
    if not claims:
        return ""
    return (
        f"disk {disk.spec.name} stays as it was: {disk.path} is in use by {listed(claims)}, and"
        f" {why}; end that use, then reload"
    )

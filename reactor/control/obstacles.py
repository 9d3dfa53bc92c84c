"""Why a disk cannot become what the config says: its device would be taken from its users."""

from __future__ import annotations

from collections.abc import Mapping

from reactor.attach.occupants import listed
from reactor.control.disk import DiskControl
from reactor.control.platform import Platform
from reactor.spec import DiskSpec


def obstacle(
    platform: Platform,
    disk: DiskControl,
    spec: DiskSpec,
    kept: Mapping[str | None, str],
    *,
    in_place: bool,
) -> str:
    """Return why `disk` must stay as it is now, for the operator; empty if it need not.

    Who has just opened the device, and neither mounted it nor put anything on it, is not asked.
    `kept`: the devices of disks that must stay as they are, and these.
    """
    elsewhere = spec.device not in ("auto", disk.path)
    if (in_place and not elsewhere) or not _has_device(disk):
        return ""
    if elsewhere and spec.device in kept:
        return f"disk {spec.name} stays as it was: disk {kept[spec.device]} keeps {spec.device}"
    keys = spec.differences(disk.spec)
    harmless = {"size", "listen"} if elsewhere else {"size", "listen", "device"}
    named = ", ".join([key for key in keys if key not in harmless] or keys or ["core"])
    return _in_use(platform, disk, f"would be taken away for another {named}")


def obstacle_to_removal(platform: Platform, disk: DiskControl) -> str:
    """Return why `disk` must stay, which the config has no more; empty if it need not."""
    if not _has_device(disk):
        return ""
    return _in_use(platform, disk, "the config has the disk no more")


def _has_device(disk: DiskControl) -> bool:
    return disk.path is not None and disk.state in ("starting", "online")


def _in_use(platform: Platform, disk: DiskControl, why: str) -> str:
    assert disk.path is not None
    claims = platform.claims(disk.path)
    if not claims:
        return ""
    return (
        f"disk {disk.spec.name} stays as it was: {disk.path} is in use by {listed(claims)}, and"
        f" {why}; end that use, then reload"
    )

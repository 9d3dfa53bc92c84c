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
    path = disk.path
    elsewhere = spec.device not in ("auto", path)
    if path is None or (in_place and not elsewhere) or disk.state not in ("starting", "online"):
        return ""
    if elsewhere and spec.device in kept:
        return f"disk {spec.name} stays as it was: disk {kept[spec.device]} keeps {spec.device}"
    claims = platform.claims(path)
    if not claims:
        return ""
    keys = spec.differences(disk.spec)
    harmless = {"size", "listen"} if elsewhere else {"size", "listen", "device"}
    named = ", ".join([key for key in keys if key not in harmless] or keys or ["core"])
    return (
        f"disk {spec.name} stays as it was: {path} is in use by {listed(claims)}, and would be"
        f" taken away for another {named}; end that use, then reload"
    )

"""Why a disk cannot become what the config says: its device would be taken from its users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from reactor.attach.occupants import listed
from reactor.control.disk import DiskControl
from reactor.control.holders import common_path
from reactor.control.platform import Platform
from reactor.errors import reason
from reactor.spec import DiskSpec

LOOK_SECONDS: Final = 0.2


class Uses:
    """Who uses the devices: each is asked once while disks become what the config says.

    The controller's loop waits meanwhile, and a device can hang, or the process that asks it. All
    that do not answer take twice as long as the first.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform
        self._patience = LOOK_SECONDS
        self._found: dict[str, list[str] | OSError] = {}

    def claims(self, device: str) -> list[str]:
        """Return what stands on a device; raises OSError when that cannot be known."""
        if device not in self._found:
            self._found[device] = self._ask(device)
        found = self._found[device]
        if isinstance(found, OSError):
            raise found
        return found

    def _ask(self, device: str) -> list[str] | OSError:
        try:
            return self._platform.claims(device, self._patience)
        except OSError as error:
            if isinstance(error, TimeoutError):
                self._patience /= 2
            return error


def obstacle(
    uses: Uses,
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
    return _in_use(uses, disk, f"would be taken away for another {named}")


def obstacle_to_removal(uses: Uses, disk: DiskControl) -> str:
    """Return why `disk` must stay, which the config has no more; empty if it need not."""
    if disk.path is None or disk.state not in ("starting", "online"):
        return ""
    return _in_use(uses, disk, "the config has the disk no more")


def _in_use(uses: Uses, disk: DiskControl, why: str) -> str:
    path = disk.path
    assert path is not None
    try:
        claims = uses.claims(path)
    except OSError as error:
        return (
            f"disk {disk.spec.name} stays as it was: it cannot be known whether {path} is in use"
            f" ({reason(error)}), and {why}; reload again"
        )
    if not claims:
        return ""
    return (
        f"disk {disk.spec.name} stays as it was: {path} is in use by {listed(claims)}, and"
        f" {why}; end that use, then reload"
    )

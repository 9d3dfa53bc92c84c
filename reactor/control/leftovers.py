"""What a service that died left on this host: devices in the kernel, data of memory disks."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from functools import partial

from reactor.control import tags
from reactor.control.link import DETACH_SECONDS
from reactor.control.platform import Platform
from reactor.errors import ReactorError, error_number, reason
from reactor.log import logger
from reactor.spec import DiskSpec

log = logger(__name__)


class LeftDevices:
    """Devices of disks that there are not any more, or not as they were.

    `on_end` comes after each. A disk of the name that is made meanwhile has to wait for it: under
    one tag only one device is found again.
    """

    def __init__(self, platform: Platform, on_end: Callable[[], None]) -> None:
        self.disks: set[str] = set()  # whose devices are on their way to be free
        self._platform = platform
        self._on_end = on_end

    def detach(self, adopted: Iterable[DiskSpec]) -> None:
        """Free those but of the disks `adopted`."""
        instance = self._platform.instance
        claimed = {tags.tag(instance, spec) for spec in adopted}
        for tag in self._platform.held(tags.prefix(instance)):
            disk = tags.disk(tag)
            device = None if tag in claimed else self._platform.adopt(tag)
            if device is not None:
                log.warning(
                    "%s is detached: it is no device of disk %s any more", device.path, disk
                )
                self.disks.add(disk)
                self._platform.call(
                    f"detaching {device.path}",
                    DETACH_SECONDS,
                    device.detach,
                    partial(self._detached, disk),
                )

    def _detached(self, disk: str, _: None, error: Exception | None) -> None:
        if error is not None:
            log.error("%s", reason(error))
        self.disks.discard(disk)
        self._on_end()


def report_left(platform: Platform, disks: Container[str]) -> set[str]:
    """Return the disks of which data is left; name those other than `disks`.

    Only they may use it again.
    """
    found = platform.leftovers()
    for backend, name in found:
        if name not in disks:
            log.warning(
                "a dead service left data of the %s disk %s: make that disk again to use"
                " the data, or to remove it",
                *(backend, name),
            )
    return {name for _, name in found}


def discard(platform: Platform, spec: DiskSpec) -> OSError | None:
    """Remove what a disk kept outside its workers; returns why that cannot be."""
    try:
        platform.discard(spec.backend, spec.name)
    except (OSError, ReactorError) as error:
        log.error(why := f"what disk {spec.name} kept cannot be removed: {reason(error)}")
        return OSError(error_number(error), why)
    return None

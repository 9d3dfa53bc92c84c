"""What a service that died left on this host: devices in the kernel, data of memory disks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable
from functools import partial

from reactor.attach.device import Device
from reactor.control import tags
from reactor.control.freeing import free
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
        self._platform = platform
        self._on_end = on_end
        self._found: list[tuple[str, Device]] = []
        self._detaching: Counter[str] = Counter()

    @property
    def disks(self) -> set[str]:
        """Whose devices are on their way to be free."""
        return {disk for disk, _ in self._found} | (+self._detaching).keys()

    def find(self, adopted: Iterable[DiskSpec]) -> None:
        """Find those but of the disks `adopted`."""
        instance = self._platform.instance
        claimed = {tags.tag(instance, spec) for spec in adopted}
        for tag in self._platform.held(tags.prefix(instance)):
            device = None if tag in claimed else self._platform.adopt(tag)
            if device is not None:
                self._found.append((tags.disk(tag), device))

    def detach(self) -> None:
        """Free them, now that no worker has them: see `DeviceLink` of one that does not read."""
        found, self._found = self._found, []
        for disk, device in found:
            log.warning("%s is detached: it is no device of disk %s any more", device.path, disk)
            self._detaching[disk] += 1
            free(self._platform, device, partial(self._detached, disk))

    def _detached(self, disk: str) -> None:
        self._detaching[disk] -= 1
        self._on_end()


def report_left(platform: Platform, disks: Container[tuple[str, str]]) -> set[str]:
    """Return those of `disks` (backend and name) of which data is left; name all others.

    Only a disk of the same backend and name may use it again.
    """
    found = platform.leftovers()
    for backend, name in found:
        if (backend, name) not in disks:
            log.warning(
                "a dead service left data of the %s disk %s: make that disk again to use"
                " the data, or to remove it",
                *(backend, name),
            )
    return {name for backend, name in found if (backend, name) in disks}


def discard(platform: Platform, spec: DiskSpec) -> OSError | None:
    """Remove what a disk kept outside its workers; returns why that cannot be."""
    try:
        platform.discard(spec.backend, spec.name)
    except (OSError, ReactorError) as error:
        log.error(why := f"what disk {spec.name} kept cannot be removed: {reason(error)}")
        return OSError(error_number(error), why)
    return None

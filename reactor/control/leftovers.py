"""What a service that died left on this host: devices in the kernel, data of memory disks."""

from __future__ import annotations

from collections.abc import Callable, Container

from backends import registry
from reactor.control.link import DETACH_SECONDS
from reactor.control.platform import Platform
from reactor.errors import ReactorError, reason
from reactor.log import logger

log = logger(__name__)


def detach_unclaimed(platform: Platform, prefix: str, is_claimed: Callable[[str], bool]) -> None:
    """Free the devices held under a tag of `prefix` and a disk's name that nobody claims."""
    for tag in platform.held(prefix):
        device = None if is_claimed(tag.removeprefix(prefix)) else platform.adopt(tag)
        if device is not None:
            log.warning("%s is detached: no disk is to be on it any more", device.path)
            name = f"detaching {device.path}"
            platform.call(name, DETACH_SECONDS, device.detach, _log_detach)


def report(instance: str, disks: Container[str]) -> None:
    """Name the disks, other than `disks`, of which data is left; only they may use it again."""
    for backend in registry.names():
        try:
            names = registry.backend(backend).leftovers(instance)
        except ReactorError as error:
            log.debug("%s", error)
            continue
        for name in names:
            if name not in disks:
                log.warning(
                    "a dead service left data of the %s disk %s: make that disk again to use"
                    " the data, or to remove it",
                    *(backend, name),
                )


def _log_detach(_: None, error: Exception | None) -> None:
    if error is not None:
        log.error("%s", reason(error))

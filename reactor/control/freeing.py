"""A device that is no disk's any more, on its way to be free."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from reactor.attach.device import Device
from reactor.control.platform import Platform
from reactor.errors import is_shortage, reason
from reactor.log import logger

DETACH_SECONDS: Final = 30.0
SHORTAGE_SECONDS: Final = 1.0
TRIES_MAX: Final = 60  # while memory or descriptors are short

log = logger(__name__)


def free(
    platform: Platform, device: Device, done: Callable[[], None], tries: int = TRIES_MAX
) -> None:
    """Detach `device`; `done` comes once that has succeeded, or will not."""

    def detached(_: None, error: Exception | None) -> None:
        if error is not None and is_shortage(error) and tries > 1:
            log.warning("%s stays attached for now: %s", device.path, reason(error))
            again = partial(free, platform, device, done, tries - 1)
            platform.reactor.call_later(SHORTAGE_SECONDS, again)
            return
        if error is not None:
            log.error("%s", reason(error))
        done()

    platform.call(f"detaching {device.path}", DETACH_SECONDS, device.detach, detached)

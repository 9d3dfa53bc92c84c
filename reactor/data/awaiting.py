"""Waits for the storage of a disk that is to be opened, beside the loop: it may hang."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Final

from backends import registry
from reactor import background
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.spec import DiskSpec

PATIENCE_SECONDS: Final = 5.0  # after that the operator hears of it

log = logger(__name__)


def await_storage(reactor: Reactor, spec: DiskSpec, then: Callable[[], None]) -> Timer:
    """Call `then` in the loop once the storage answers, or says that it is out of order.

    Returns what cancels that.
    """
    call = Timer(0, then)
    patience = reactor.call_later(
        PATIENCE_SECONDS,
        lambda: log.warning("disk %s waits for its storage, which does not answer", spec.name),
    )

    def go_on() -> None:
        patience.cancel()
        if call.function is not None:
            call.function()

    def wait() -> None:
        try:
            with suppress(Exception):  # opening it will tell
                registry.backend(spec.backend).await_storage(spec.options)
            reactor.call_from_thread(go_on)
        except MemoryError:
            reactor.lose()

    try:
        background.start(wait)
    except OSError:
        reactor.call_from_thread(go_on)
    return call

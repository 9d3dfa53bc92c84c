"""Python's search for cyclic garbage, kept out of the way of requests."""

from __future__ import annotations

import gc
from typing import Final

from reactor.loop import Reactor

COLLECT_SECONDS: Final = 5.0


def collect_by_timer(reactor: Reactor) -> None:
    """Search by a timer, and only among what was made from now on.

    By itself Python searches after every 700 new objects, in the middle of a batch of requests,
    and now and then through all modules, for 4 ms. Requests make no cycles; a connection
    that ends leaves a few.
    """
    gc.collect()
    gc.freeze()
    gc.disable()

    def collect() -> None:
        gc.collect()
        reactor.call_later(COLLECT_SECONDS, collect)

    reactor.call_later(COLLECT_SECONDS, collect)

"""Python's search for cyclic garbage, kept out of the way of requests."""

from __future__ import annotations

import gc
from typing import Final

from reactor.loop import Reactor

COLLECT_SECONDS: Final = 5.0
IDLE_NS: Final = 50_000_000  # of work in that time: then nobody minds a long search
YOUNG: Final = 1  # the generations up to this
LATEST: Final = 120  # searches for young garbage; then comes a long one, whatever there is to do
YOUNG_MAX: Final = 10_000  # objects; to look at so many takes 0.1 ms
REST: Final = 1000  # times as long as a search took none begins ...
REST_SECONDS: Final = 600.0  # ... but no longer


def collect_by_timer(reactor: Reactor) -> None:
    """Search by a timer, and only among what was made from now on.

    By itself Python searches after every 700 new objects, in the middle of a batch of requests,
    and now and then through all modules, for 4 ms. Requests make no cycles; a connection
    that ends leaves a few. Among 1024 connections a search takes 1.2 ms, so while there is work
    only what is young is looked at, which is next to nothing. If it is much, it is replies that
    clients do not take, a million and more of them: no garbage, and 45 ms of looking.
    """
    gc.collect()
    gc.freeze()
    gc.disable()

    worked_ns = 0
    searches = 0

    def collect() -> None:
        nonlocal worked_ns, searches
        before, worked_ns = worked_ns, reactor.busy_ns
        searches += 1
        began = reactor.clock()
        if worked_ns - before < IDLE_NS or searches > LATEST:
            searches = 0
            gc.collect()
        elif gc.get_count()[0] <= YOUNG_MAX:
            gc.collect(YOUNG)
        took = (reactor.clock() - began) / 1e9
        rest = min(REST * took, REST_SECONDS)
        reactor.call_later(max(COLLECT_SECONDS, rest), collect)

    reactor.call_later(COLLECT_SECONDS, collect)

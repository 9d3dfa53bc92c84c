"""A request that the kernel sends twice is not under way twice: connections that are fenced.

The kernel's driver sends a request again, on another connection, when the one that it was sent on
is shut: because its worker died, or the request took longer than `timeout`. The first copy may
still be in the storage's queue then, or in a worker that was stopped. Were the second answered
before the first has ended, what the application writes next would be overwritten by the first.

A request keeps its hardware queue however often it is sent. That is its lane, and:

1. Only who holds the lane begins what changes the disk. One connection, of one worker, holds it,
   from before it begins a request until nothing that it has begun is in flight any more. Should its
   process die, the lock ends with the last I/O that it left behind (see `backends.lanes`).
2. Who has just taken a lane looks whether the kernel has shut the connection, and then begins
   nothing more. The kernel shuts a connection before it sends elsewhere what it had sent there.

So let a copy be begun, on B, which another was sent before, on A. B holds the lane. If A had begun
the first copy, it has ended, or B could not have taken the lane (1). If A has yet to, it must take
the lane after B has given it up; by then A is shut, and begins nothing (2). So what is answered
has no copy that changes anything later, whoever is slow, stopped or dead.

Nobody waits for ever: a holder gives up all its lanes every few milliseconds if nothing is in
flight; else, if someone wishes for one, it begins nothing until what is in flight has ended. That
needs no lane, only the storage. While it waits for a lane itself it gives up its own in the same
way. A holder that is stopped keeps the others waiting until it goes on or is killed; the kernel
shuts who waits longer than `timeout`, and everything is sent once more.

Reads and flushes change nothing, and need no lane.
"""

from __future__ import annotations

import platform
import re
import select
import socket
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Final

from backends.api import Channel, Request
from backends.lanes import LaneLocks
from reactor.data.connection import Connection
from reactor.loop import Reactor, Timer
from reactor.protocol.export import Export
from reactor.protocol.wire import NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES

LOOK_SECONDS: Final = 0.01  # how often who holds a lane looks whether it can be given up
WAIT_SECONDS: Final = 0.003  # how often who waits for a lane tries to take it
YIELD_SECONDS: Final = 0.02  # for which who gave up a lane that was wished for leaves it to others
CHANGING: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})

# drivers/block/nbd.c, nbd_cmd_handle(): a counter of 32 bits, then blk_mq_unique_tag(): 16 bits of
# the hardware queue and 16 of the tag in it, both below 256. Linux sends that in its own byte
# order up to 6.3 and in the network's since, where distributions have not changed it.
NETWORK_ORDER_SINCE: Final = (6, 4)
STRANGE: Final = 1 << 16  # the lane of all whose handle is neither


class Lanes:
    """The lanes of one open disk, and which of the connections here hold or wish for them."""

    def __init__(self, fd: int | None, reactor: Reactor, disk: str) -> None:
        """Share them with all who have opened the file `fd`; None: nobody has the data but us.

        `disk` names it in the log.
        """
        self._locks = LaneLocks(fd, reactor, disk)
        self._holders: dict[int, FencedConnection] = {}
        self._wishes: defaultdict[int, set[FencedConnection]] = defaultdict(set)
        #: Whether handles are in the network's byte order; None: nothing told yet.
        self.network_order: bool | None = None if sys.byteorder == "little" else True

    def close(self) -> None:
        """Touch the file no more; no connection is left."""
        self._locks.close()

    def lane_of(self, handle: int) -> int:
        """Return the lane of a request by its handle, taken from the wire as big endian."""
        swapped = int.from_bytes(handle.to_bytes(8, "little"), "big")
        in_order = self.network_order
        if in_order is None:
            network, native = _is_plausible(handle), _is_plausible(swapped)
            if network != native:
                self.network_order = network
            elif not network:
                return STRANGE
            in_order = network and (not native or _is_recent(platform.release()))
        return (handle if in_order else swapped) >> 16 & 0xFFFF

    def take(self, lane: int, connection: FencedConnection) -> bool:
        """Take a lane; False while another connection holds it."""
        if lane not in self._holders:
            self._holders[lane] = connection  # first, as it may lack memory
            if not self._locks.take(lane):
                del self._holders[lane]
        return self._holders.get(lane) is connection

    def give_up(self, lane: int) -> None:
        """Let others have a lane that a connection here holds."""
        del self._holders[lane]
        self._locks.give_up(lane)

    def give_up_all_of(self, connection: FencedConnection) -> None:
        """Let others have what a connection here holds."""
        for lane in [lane for lane, holder in self._holders.items() if holder is connection]:
            self.give_up(lane)

    def wish(self, lane: int, connection: FencedConnection) -> None:
        """Ask whoever holds a lane to give it up. To be repeated, as it may fail unnoticed."""
        self._wishes[lane].add(connection)
        self._locks.wish(lane)

    def wish_no_more(self, lane: int, connection: FencedConnection) -> None:
        """Take a wish back."""
        self._wishes[lane].discard(connection)
        if not self._wishes[lane]:
            self._locks.wish_no_more(lane)

    def is_wished(self, lane: int) -> bool:
        """Return whether anyone but its holder wishes for the lane."""
        return bool(self._wishes[lane]) or self._locks.is_wished(lane)


class FencedConnection(Connection):
    """A connection of the kernel that begins a change only while it holds the request's lane.

    What may not begin yet waits in the backlog, with all that came behind it.
    """

    def __init__(
        self,
        lanes: Lanes,
        reactor: Reactor,
        sock: socket.socket,
        export: Export,
        channel: Channel,
        on_closed: Callable[[Connection, str], None],
    ) -> None:
        self._lanes = lanes
        self._held: set[int] = set()
        self._wished: int | None = None
        self._yielding = False
        self._look: Timer | None = None
        self._retry: Timer | None = None
        # A handle with these bits is of the lane that was taken last.
        self._mask = 0
        self._bits = -1
        super().__init__(reactor, sock, export, channel, on_closed, resends=True)
        self._forget_bits()

    def _submit(self, requests: list[Request]) -> None:
        if self._refusing:
            self._wish_no_more()
            super()._submit(requests)
            return
        count = self._count_allowed(requests)
        if count == len(requests):
            super()._submit(requests)
            return
        super()._submit(requests[:count])
        held_back_by_room = bool(self._backlog)
        self._backlog += requests[count:]
        self._paused = True
        if not held_back_by_room:
            self._busy = True
            self._try_again_in(WAIT_SECONDS)

    def _release(self) -> None:
        self._wish_no_more()
        for timer in (self._look, self._retry):
            if timer is not None:
                timer.cancel()
        if not self._in_flight:
            self._give_up_lanes()
        super()._release()

    # --- what may begin ---

    def _count_allowed(self, requests: list[Request]) -> int:
        """Return how many of the first requests may be submitted now."""
        if self._yielding:
            return 0
        mask, bits = self._mask, self._bits
        for place, (command, _, cookie, _, _, _) in enumerate(requests):
            if command == NBD_CMD_READ or cookie & mask == bits or command not in CHANGING:
                continue
            if not self._has_lane(cookie):
                return place
            mask, bits = self._mask, self._bits
        return len(requests)

    def _has_lane(self, cookie: int) -> bool:
        """Take the lane of a request, unless another has it or this connection is over."""
        lane = self._lanes.lane_of(cookie)
        if lane not in self._held:
            if not self._lanes.take(lane, self):
                self._wish(lane)
                return False
            if _is_shut(self._sock):  # the loop is about to hear of it, and closes it
                self._lanes.give_up(lane)
                return False
            self._held.add(lane)
            if self._look is None:
                self._look = self._reactor.call_later(LOOK_SECONDS, self._look_at_lanes)
        self._wish_no_more()
        self._remember_bits(cookie, lane)
        return True

    def _remember_bits(self, cookie: int, lane: int) -> None:
        order = self._lanes.network_order
        if order is None or lane == STRANGE:
            return
        begin = 4 if order else 2  # of the handle's bytes
        self._mask = 0xFFFF << 8 * (6 - begin)
        self._bits = cookie & self._mask
        if self._shortcut is not None:
            place = slice(begin, begin + 2)
            self._shortcut.write_only(place, cookie.to_bytes(8, "big")[place])

    def _forget_bits(self) -> None:
        self._mask, self._bits = 0, -1
        if self._shortcut is not None:
            self._shortcut.write_only(slice(0), b"nothing")

    # --- waiting ---

    def _wish(self, lane: int) -> None:
        if self._wished != lane:
            self._wish_no_more()
            self._wished = lane
        self._lanes.wish(lane, self)

    def _wish_no_more(self) -> None:
        lane, self._wished = self._wished, None
        if lane is not None:
            self._lanes.wish_no_more(lane, self)

    def _try_again_in(self, seconds: float) -> None:
        def retry() -> None:
            self._retry = None
            self.resume()

        if self._retry is None:
            self._retry = self._reactor.call_later(seconds, retry)

    # --- giving up ---

    def _look_at_lanes(self) -> None:
        """Give up all lanes if nothing is in flight, else see to that if one is wished for."""
        # First, as it must be looked again should anything below fail.
        self._look = self._reactor.call_later(LOOK_SECONDS, self._look_at_lanes)
        placing = self._shortcut is not None and self._shortcut.placing
        if not self._in_flight and not placing:
            self._give_up_lanes()
            self._look.cancel()
            self._look = None
            if self._yielding:
                self._reactor.call_later(YIELD_SECONDS, self._yield_no_more)
            return
        if not self._yielding and any(self._lanes.is_wished(lane) for lane in self._held):
            self._yielding = True
            self._forget_bits()

    def _yield_no_more(self) -> None:
        self._yielding = False
        self.resume()

    def _give_up_lanes(self) -> None:
        self._forget_bits()
        self._held.clear()
        self._lanes.give_up_all_of(self)


def _is_plausible(handle: int) -> bool:
    return not handle & 0xFF00FF00


def _is_recent(release: str) -> bool:
    numbers = re.findall(r"\d+", release)[:2]
    return tuple(map(int, numbers)) >= NETWORK_ORDER_SINCE


def _is_shut(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, 0)
    return any(events & select.POLLHUP for _, events in poll.poll(0))

"""Spreads the clients of one disk over the workers that share it."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from reactor.bus import RECEIVE_BYTES, send_descriptors
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.messages import encode

HANDED_MAX: Final = 256  # clients of one disk that one other worker serves
TAKE_SECONDS: Final = 1.0  # until a worker must have taken a client
REFUSAL_SECONDS: Final = 0.5  # for which a worker is spared that refused a client
SILENCE_SECONDS: Final = 10.0  # for which one is that did not answer

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class _Offer:
    """A client that a worker has yet to take, and what it sent behind its handshake."""

    client: socket.socket
    trailing: bytes
    deadline: Timer


class ClientSpread:
    """Offers each client to the worker with the fewest, by the `members`' descriptor sockets.

    With every client goes an end of a socket pair, its leash. The worker takes the client by
    writing one byte to it, and closes it when the client has left. Until the byte has come the
    client is kept here; should the worker close the leash, die, or stay silent, `serve` gets the
    client. Nobody can take it then: the leash is shut, and the worker's byte fails with EPIPE.
    """

    def __init__(
        self,
        reactor: Reactor,
        disk: str,
        members: Sequence[Path],
        serve: Callable[[socket.socket, bytes], None],
    ) -> None:
        self.members = members
        self._reactor = reactor
        self._disk = disk
        self._serve = serve
        self._leashes: defaultdict[Path, set[socket.socket]] = defaultdict(set)
        self._offers: dict[socket.socket, _Offer] = {}  # by leash
        self._spared: dict[Path, int] = {}  # until when, by the reactor's clock

    def give(self, client: socket.socket, trailing: bytes, own: int) -> None:
        """Have the client served by another worker, or by this one, which has `own`."""
        member = self._fewest(own)
        if member is None or not self._offer(member, client, trailing):
            self._serve_here(client, trailing)

    def close(self) -> None:
        """Watch the clients no longer: those that were taken are served on, the others end."""
        for offer in self._offers.values():
            offer.deadline.cancel()
            offer.client.close()
        self._offers.clear()
        for leashes in self._leashes.values():
            for leash in leashes:
                self._let_go(leash)
        self._leashes.clear()

    def _fewest(self, own: int) -> Path | None:
        now = self._reactor.clock()
        members = [member for member in self.members if self._spared.get(member, 0) <= now]
        member = min(members, key=lambda member: len(self._leashes[member]), default=None)
        if member is None or len(self._leashes[member]) >= min(own, HANDED_MAX):
            return None
        return member

    def _offer(self, member: Path, client: socket.socket, trailing: bytes) -> bool:
        header = encode("client", disk=self._disk, trailing=trailing)
        if len(header) > RECEIVE_BYTES:
            return False
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:  # out of descriptors
            log.warning("disk %s: no client can be given away: %s", self._disk, reason(error))
            return False
        try:
            send_descriptors(member, [client.fileno(), theirs.fileno()], header)
        except OSError as error:  # it is dead, or has too much to do
            log.debug("disk %s: %s takes no client: %s", self._disk, member.name, reason(error))
            ours.close()
            return False
        finally:
            theirs.close()
        ours.setblocking(False)
        heard, silent = partial(self._heard, member, ours), partial(self._silent, member, ours)
        self._reactor.add_fd(ours.fileno(), heard, name=f"client of disk {self._disk}")
        self._leashes[member].add(ours)
        deadline = self._reactor.call_later(TAKE_SECONDS, silent)
        self._offers[ours] = _Offer(client, trailing, deadline)
        return True

    def _heard(self, member: Path, leash: socket.socket, _events: int) -> bool:
        self._settle(member, leash, REFUSAL_SECONDS)
        return True

    def _silent(self, member: Path, leash: socket.socket) -> None:
        leash.shutdown(socket.SHUT_RD)  # it may have been taken just now, but will not be later
        self._settle(member, leash, SILENCE_SECONDS)

    def _settle(self, member: Path, leash: socket.socket, spare_seconds: float) -> None:
        """Read from the leash whether the client was taken, or has left, or is ours to serve."""
        taken = leash.recv(1)
        offer = self._offers.pop(leash, None)
        if offer is not None:
            offer.deadline.cancel()
        if taken:
            if offer is not None:
                offer.client.close()
            return
        self._leashes[member].remove(leash)
        self._let_go(leash)
        if offer is not None:
            log.info("disk %s: %s did not take a client", self._disk, member.name)
            self._spared[member] = self._reactor.clock() + int(spare_seconds * 1e9)
            self._serve_here(offer.client, offer.trailing)

    def _serve_here(self, client: socket.socket, trailing: bytes) -> None:
        try:
            self._serve(client, trailing)
        except OSError as error:
            log.warning("disk %s: a client cannot be served: %s", self._disk, reason(error))
            client.close()

    def _let_go(self, leash: socket.socket) -> None:
        self._reactor.remove_fd(leash.fileno())
        leash.close()

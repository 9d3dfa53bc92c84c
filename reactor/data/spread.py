"""Spreads the clients of one disk over the workers that share it."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from reactor.bus import RECEIVE_BYTES, send_descriptors
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import Reactor
from reactor.messages import encode

HANDED_MAX: Final = 256  # clients of one disk that other workers serve

log = logger(__name__)


class ClientSpread:
    """Gives each client to the worker with the fewest, by the `members`' sockets for descriptors.

    With every client goes an end of a socket pair, its leash. When the worker closes it, or dies,
    the client is known to have left.
    """

    def __init__(self, reactor: Reactor, disk: str, members: Sequence[Path]) -> None:
        self._reactor = reactor
        self._disk = disk
        self._leashes: dict[Path, set[socket.socket]] = {member: set() for member in members}

    def give(self, client: socket.socket, trailing: bytes, own: int) -> bool:
        """Give the client away; False when this worker, which has `own`, is to serve it."""
        if not self._leashes:
            return False
        member = min(self._leashes, key=lambda member: len(self._leashes[member]))
        header = encode("client", disk=self._disk, trailing=trailing)
        handed = sum(map(len, self._leashes.values()))
        if len(self._leashes[member]) >= own or len(header) > RECEIVE_BYTES or handed >= HANDED_MAX:
            return False
        ours, theirs = socket.socketpair()
        try:
            send_descriptors(member, [client.fileno(), theirs.fileno()], header)
        except OSError as error:  # it is dead, or has too much to do
            log.debug("disk %s: %s takes no client: %s", self._disk, member.name, reason(error))
            ours.close()
            return False
        finally:
            theirs.close()
        client.close()
        self._leashes[member].add(ours)
        left = partial(self._left, member, ours)
        self._reactor.add_fd(ours.fileno(), left, name=f"client of disk {self._disk}")
        return True

    def close(self) -> None:
        """Watch the clients no longer; they are served on."""
        for leashes in self._leashes.values():
            for leash in list(leashes):
                self._let_go(leash)
            leashes.clear()

    def _left(self, member: Path, leash: socket.socket, _events: int) -> bool:
        self._leashes[member].remove(leash)
        self._let_go(leash)
        return True

    def _let_go(self, leash: socket.socket) -> None:
        self._reactor.remove_fd(leash.fileno())
        leash.close()

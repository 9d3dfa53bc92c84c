"""The sockets of a device, and the workers' ends of new ones on their way."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass

from reactor.control.shares import Share


@dataclass(slots=True)
class Slot:
    """A socket of the device."""

    place: int  # the connection whose worker should serve it
    share: Share | None = None  # who does; None: it must be replaced
    generation: int = 0  # of the socket
    handed_ns: int = 0  # when it was given to the worker


@dataclass(frozen=True, slots=True)
class Delivery:
    """A worker's end of a new socket, on its way."""

    slot: Slot
    share: Share
    pid: int | None  # to a later worker the end means nothing: it has not opened the disk yet
    end: socket.socket


def server(shares: Sequence[Share], place: int) -> Share:
    """Return who is to serve the connection: another one where a worker was given up."""
    own = shares[place]
    if not own.given_up:
        return own
    others = [share for share in dict.fromkeys(shares) if not share.given_up]
    return others[place % len(others)] if others else own


def drop(deliveries: Sequence[Delivery]) -> None:
    """Close what is not delivered; the kernel then sees its ends dead."""
    for delivery in deliveries:
        delivery.end.close()

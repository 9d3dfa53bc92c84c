"""The sockets of a device, and the workers' ends of new ones on their way."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from reactor.control.platform import Platform
from reactor.control.share import Share


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


Ends: TypeAlias = tuple[list[socket.socket], list[Delivery]]  # the kernel's, and the workers'


def server(shares: Sequence[Share], place: int) -> Share:
    """Return who is to serve the connection: another one where a worker was given up."""
    own = shares[place]
    if not own.given_up:
        return own
    others = [share for share in dict.fromkeys(shares) if not share.given_up]
    return others[place % len(others)] if others else own


def socket_pairs(platform: Platform, shares: Sequence[Share], slots: Sequence[Slot]) -> Ends:
    """Return the kernel's end for each slot, and the worker's end on its way to its worker.

    Raises OSError when there are none to be had now.
    """
    kernel_ends: list[socket.socket] = []
    deliveries: list[Delivery] = []
    try:
        for slot in slots:
            kernel_end, worker_end = platform.socket_pair()
            share = server(shares, slot.place)
            kernel_ends.append(kernel_end)
            deliveries.append(Delivery(slot, share, share.worker.pid, worker_end))
    except OSError:
        for end in kernel_ends:
            end.close()
        drop(deliveries)
        raise
    return kernel_ends, deliveries


def drop(deliveries: Sequence[Delivery]) -> None:
    """Close what is not delivered; the kernel then sees its ends dead."""
    for delivery in deliveries:
        delivery.end.close()

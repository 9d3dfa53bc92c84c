"""The control messages: maps in msgpack, versioned and validated against one table.

Commands go from the controller to a worker and carry an `id`; the answer carries it back. An event
that answers no command has id 0. Repeating a command is harmless.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

import msgpack

from reactor import __version__
from reactor.errors import BusError
from reactor.spec import DiskSpec

VERSION: Final = 1
MESSAGE_MAX: Final = 4 << 20  # bytes; the counters of all disks that a worker can have
BOOT_FAILURE: Final = 3  # a worker's exit status: starting again will not help
SHORTAGE: Final = 4  # a worker's exit status: of something that there may be later

Message: TypeAlias = dict[str, Any]

_DISK = {"id": int, "disk": str}

#: What the controller says.
COMMANDS: Final[dict[str, dict[str, type]]] = {
    # Say hello, with all that you have, to the controller of this pid.
    "inquire": {"id": int, "controller": int},
    "welcome": {"controller": int},  # the hello was taken, by the controller of this pid
    # Open the disk. `shared`: other workers open it too. `leads`: serve its listeners, and spread
    # the clients over the workers of the cores `members`. `least`: see `Backend.create`.
    "start": {
        "id": int,
        "spec": dict,
        "shared": bool,
        "leads": bool,
        "members": list,
        "least": int,
    },
    "stop": {**_DISK, "seconds": float},  # drain for at most so long, then release everything
    "release": {**_DISK, "seconds": float},  # drain, then close the kernel's connections
    "remove": {**_DISK},  # hot remove: from now on refuse its I/O
    "resize": {**_DISK, "size": int, "follow": bool},  # follow: another worker does the change
    "shutdown": {"id": int},  # every disk is stopped; exit
}

#: What a worker says.
EVENTS: Final[dict[str, dict[str, type]]] = {
    # The answer to `inquire`, and, with id 0, what a new worker says until it is welcome. `disks`
    # has a REPORT of each; it is not sent while one of them is being stopped or released.
    "hello": {"id": int, "core": int, "pid": int, "disks": list},
    # Answers: the disk serves; size and block_size in bytes, flags as in the NBD handshake.
    "started": {**_DISK, "size": int, "block_size": int, "flags": int},
    "stopped": {**_DISK},
    "released": {**_DISK},
    "resized": {**_DISK, "size": int},
    "failed": {**_DISK, "errno": int, "reason": str},
    # The backend went away, or was told to: I/O is refused, what was in flight has ended.
    "removed": {**_DISK, "reason": str},
    # Its clients find nobody, as it cannot listen; again and again. Empty: they do again.
    "unheard": {"disk": str, "reason": str},
    # A kernel connection ended; generation is the controller's number of the attachment.
    "disconnected": {"disk": str, "generation": int, "reason": str},
    # Once a second, also the heartbeat. `reactor` and each of `disks` are maps of counters.
    # `events`: how many others came since the hello; who heard of fewer inquires.
    "statistics": {"reactor": dict, "disks": dict, "events": int},
}

#: What a worker says of a disk that it has open.
REPORT: Final[dict[str, type]] = {
    "spec": dict,
    "shared": bool,  # other workers may have it open too, as `start` said when it was opened
    "leads": bool,
    "members": list,  # as it was told by `start`
    "size": int,
    "block_size": int,
    "flags": int,
    "refusing": bool,  # the backend went away, or was told to
    "reason": str,
    "connections": list,  # (generation, position) of the kernel's that it serves
}

#: What comes with descriptors over a worker's datagram socket.
HANDOVERS: Final[dict[str, dict[str, type]]] = {
    # One socket whose other end the kernel has, as number `position` of the device's sockets.
    "connection": {"disk": str, "generation": int, "position": int},
    "listener": {"name": str},  # a listening socket that systemd made
    # From another worker: a client behind its handshake with what it sent since, and a socket that
    # gets one byte to take the client and is closed with the client's.
    "client": {"disk": str, "trailing": bytes},
}


def start_line(arguments: Sequence[str]) -> str:
    """Return what a worker's program and options are; a controller adopts only its own like.

    Of two builds of one version it tells those that have each an environment of their own.
    """
    return " ".join([__version__, *map(repr, (os.path.realpath(sys.prefix), *arguments))])


def encode(kind: str, **fields: Any) -> bytes:
    """Return the message as bytes."""
    packed: bytes = msgpack.packb({"v": VERSION, "type": kind, **fields})
    return packed


def decode(frame: bytes, table: dict[str, dict[str, type]]) -> Message:
    """Return the message in `frame`; raises BusError when it is none of `table`'s."""
    if len(frame) > MESSAGE_MAX:
        raise BusError(f"control message of {len(frame)} bytes, more than {MESSAGE_MAX}")
    try:
        message = msgpack.unpackb(frame)
    except Exception as error:  # msgpack raises half a dozen types, ValueError among them
        raise BusError(f"control message is not msgpack: {error}") from error
    if not isinstance(message, dict) or message.get("v") != VERSION:
        raise BusError(f"control message is not of version {VERSION}")
    kind = message.get("type")
    if not isinstance(kind, str) or kind not in table:
        raise BusError(f"control message of unknown type {kind!r}")
    _check(kind, message, table[kind])
    if kind == "hello":
        for report in message["disks"]:
            _check("hello, a disk", report, REPORT)
            try:
                DiskSpec.from_message(report["spec"])
            except (ValueError, TypeError) as error:
                raise BusError(f"control message hello, a disk: its spec: {error}") from error
    return message


def _check(kind: str, content: Any, fields: Mapping[str, type]) -> None:
    if not isinstance(content, dict):
        raise BusError(f"control message {kind}: it is no map")
    for name, expected in fields.items():
        value = content.get(name)
        if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
            raise BusError(f"control message {kind}: {name} is missing or not {expected.__name__}")

"""Telling systemd how the service is (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import Final

from reactor.errors import UsageError, reason
from reactor.log import logger
from reactor.loop import Reactor

EXTEND_SECONDS: Final = 10

log = logger(__name__)


def notify(state: str) -> None:
    """Send `state` (as READY=1) to the service manager, where there is one."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            sock.connect(address)
            sock.send(state.encode())
    except OSError as error:
        log.warning("the service manager cannot be told %s: %s", state, error)


def notify_reloading() -> None:
    """Say that the config is read again; READY=1 ends that."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def feed_watchdog(reactor: Reactor) -> None:
    """Say from now on that the loop turns, twice in the time after which it counts as hung."""
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if os.environ.get("WATCHDOG_PID") != str(os.getpid()) or not microseconds.isdecimal():
        return
    seconds = int(microseconds) / 2e6

    def feed() -> None:
        notify("WATCHDOG=1")
        reactor.call_later(seconds, feed)

    feed()


def extend_start(reactor: Reactor, is_over: Callable[[], bool]) -> None:
    """Ask for more time until the start is over: what it waits for has deadlines of its own."""

    def ask() -> None:
        if not is_over():
            notify(f"EXTEND_TIMEOUT_USEC={3 * EXTEND_SECONDS * 1_000_000}")
            reactor.call_later(EXTEND_SECONDS, ask)

    reactor.call_later(EXTEND_SECONDS, ask)


def handed_sockets() -> dict[str, list[socket.socket]]:
    """Take the sockets of systemd's socket activation, by name (sd_listen_fds(3)).

    A name may have several. Raises UsageError when what the environment says is not so.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    handed: dict[str, list[socket.socket]] = {}
    try:
        for position in range(int(os.environ.get("LISTEN_FDS", "0"))):
            fd = 3 + position  # SD_LISTEN_FDS_START
            os.set_inheritable(fd, False)
            name = names[position] if position < len(names) and names[position] else "unknown"
            handed.setdefault(name, []).append(socket.socket(fileno=fd))
    except (ValueError, OSError) as error:
        raise UsageError(f"the sockets that LISTEN_FDS names: {reason(error)}") from error
    for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(variable, None)  # not meant for the workers
    return handed

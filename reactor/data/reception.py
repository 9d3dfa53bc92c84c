"""Where a worker listens for clients, and to whom each of them goes."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Final

from reactor.bus import descriptor_socket
from reactor.data.listener import Listener
from reactor.data.serving import ServedDisk
from reactor.data.spread import ClientSpread
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.protocol.export import Export
from reactor.spec import Address, DiskSpec

AGAIN_SECONDS: Final = 2.0  # from one try to listen to the next

log = logger(__name__)


class Reception:
    """The listeners of a worker, by address; several disks may share one.

    `on_unheard(disk, why)`: there is nobody at one of the disk's addresses, for now; an empty
    `why`: there is again.
    """

    def __init__(
        self, reactor: Reactor, runtime_dir: Path, on_unheard: Callable[[str, str], None]
    ) -> None:
        self._reactor = reactor
        self._runtime_dir = runtime_dir
        self._on_unheard = on_unheard
        self._disks: dict[str, ServedDisk] = {}
        self._listeners: dict[Address, list[Listener]] = {}
        self._handed: dict[str, list[socket.socket]] = {}  # systemd's, by name
        self._spreads: dict[str, ClientSpread] = {}
        self._again: dict[str, Timer] = {}  # of those that cannot listen yet

    def close(self) -> None:
        """Release systemd's sockets; the disks are stopped already."""
        for socks in self._handed.values():
            close_all(socks)

    def hand_over(self, name: str, socks: list[socket.socket]) -> None:
        """Take the listening sockets that systemd calls `name`."""
        close_all(self._handed.pop(name, []))
        self._handed[name] = socks

    def listen(self, served: ServedDisk, *, must: bool) -> None:
        """Listen for the disk's clients on all its addresses.

        Raises OSError if it `must` and cannot; else each is tried again until it can be, or
        `unlisten`.
        """
        error = self._listen(served)
        if error is None:
            return
        if must:
            raise error
        log.warning("disk %s is not served everywhere: %s", served.spec.name, reason(error))
        self._try_again(served, error)

    def listen_instead(self, served: ServedDisk, spec: DiskSpec) -> None:
        """Listen on the addresses of `spec`; clients of those that stay notice nothing."""
        self._give_up_trying(spec.name)
        self._leave(served, but=spec.listen)
        served.spec = spec
        self.listen(served, must=False)

    def unlisten(self, served: ServedDisk) -> None:
        """Stop listening for the disk's clients, and spreading them."""
        name = served.spec.name
        self._give_up_trying(name)
        if name in self._spreads:
            self._spreads.pop(name).close()
        self._disks.pop(name, None)
        self._leave(served)

    def _leave(self, served: ServedDisk, but: Collection[Address] = ()) -> None:
        name = served.spec.name
        for address in {*served.spec.listen}.difference(but):
            for listener in self._listeners.get(address, ()):
                listener.exports.pop(name, None)
            if not any(listener.exports for listener in self._listeners.get(address, ())):
                for listener in self._listeners.pop(address, ()):
                    listener.close()

    def spread(self, served: ServedDisk) -> None:
        """Give the disk's clients to the workers that share it too."""
        name = served.spec.name
        members = [descriptor_socket(self._runtime_dir, core) for core in served.members]
        if name in self._spreads:
            self._spreads[name].members = members
            return

        def serve(client: socket.socket, trailing: bytes) -> None:
            served.serve(client, 0, trailing)

        self._spreads[name] = ClientSpread(self._reactor, name, members, serve)

    def _listen(self, served: ServedDisk) -> OSError | None:
        """Listen on every address of the disk that can be had; returns why one cannot."""
        name, problem = served.spec.name, None
        self._disks[name] = served
        for address in served.spec.listen:
            if address not in self._listeners:
                try:
                    self._listeners[address] = self._open(address)
                except OSError as error:
                    problem = problem or error
                    continue
            for listener in self._listeners[address]:
                listener.exports[name] = served.export
        return problem

    def _try_again(self, served: ServedDisk, error: OSError) -> None:
        name = served.spec.name
        self._on_unheard(name, reason(error))  # each time: the controller may be another
        again = partial(self._listen_again, served)
        self._again[name] = self._reactor.call_later(AGAIN_SECONDS, again)

    def _listen_again(self, served: ServedDisk) -> None:
        name = served.spec.name
        del self._again[name]
        error = self._listen(served)
        if error is not None:
            self._try_again(served, error)
        else:
            log.info("disk %s is served everywhere again", name)
            self._on_unheard(name, "")

    def _give_up_trying(self, name: str) -> None:
        if name in self._again:
            self._again.pop(name).cancel()
            self._on_unheard(name, "")

    def _open(self, address: Address) -> list[Listener]:
        if address.kind != "systemd":
            return [Listener(self._reactor, address, self._on_client)]
        handed = self._handed.get(address.target)
        if not handed:
            raise OSError(errno.ENOENT, f"systemd handed over no socket called {address.target}")
        opened: list[Listener] = []
        try:
            for sock in handed:
                listener = Listener(self._reactor, address, self._on_client, sock=sock.dup())
                opened.append(listener)
        except BaseException:
            close_all(opened)
            raise
        return opened

    def _on_client(self, sock: socket.socket, export: Export, trailing: bytes) -> None:
        served = self._disks.get(export.name)
        if served is None or export.name not in self._spreads:
            sock.close()
        else:
            self._spreads[export.name].give(sock, trailing, served.clients)


def close_all(closables: Iterable[socket.socket | Listener]) -> None:
    """Close each of them."""
    for closable in closables:
        closable.close()

"""The platform of a real service."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

from backends import registry
from reactor.attach import device
from reactor.bus import ControllerBus, descriptor_socket, send_descriptors
from reactor.control.blocking import BlockingCall
from reactor.control.launcher import Launcher
from reactor.control.platform import Bus, Call, Process, Survivor
from reactor.control.process import WatchedProcess
from reactor.control.runtime import RuntimeDir
from reactor.errors import ReactorError
from reactor.log import logger
from reactor.loop import Reactor
from reactor.messages import Message, encode
from reactor.options import Options

SOCKET_BUFFER: Final = 4 << 20  # bytes each way between kernel and worker
# The driver sends with the kernel's whole reserve of memory (memalloc_noreclaim_save in sock_xmit):
# what a worker has not read yet would use it up, 4 MiB on a host of 1 GiB. With none left the
# driver drops the connection (ENOBUFS), and nothing can be written out to free more.
SOCKET_BUFFER_OF_SWAP: Final = 64 << 10
SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h; Python does not name it

Result = TypeVar("Result")

log = logger(__name__)


class Linux:
    """See `platform.Platform`."""

    def __init__(self, reactor: Reactor, options: Options, runtime: RuntimeDir) -> None:
        self.reactor = reactor
        self.instance = runtime.instance
        self.boot = runtime.boot
        self.pid = os.getpid()
        self.cpus = os.cpu_count() or 1
        self._runtime = runtime
        self._launcher = Launcher(options, runtime.instance)
        device.DEVICE_IO.lock_memory = options.lock_memory
        self._socket_buffer = SOCKET_BUFFER_OF_SWAP if options.lock_memory else SOCKET_BUFFER

    def close(self) -> None:
        """End the processes that are no workers."""
        self._launcher.close()
        device.DEVICE_IO.close()

    # --- workers ---

    def connect(self, on_event: Callable[[bytes, Message], None]) -> Bus:
        return ControllerBus(self.reactor, self._runtime.path / "bus.sock", on_event)

    def survivors(self) -> list[Survivor]:
        return [
            Survivor(
                left.core,
                WatchedProcess(self.reactor, left.pid, left.pidfd),
                left.start_line == self._launcher.start_line,
            )
            for left in self._runtime.surviving_workers()
        ]

    def launch(self, core: int) -> Process:
        child = self._launcher.launch(core)
        try:
            pidfd = os.pidfd_open(child.pid)
        except OSError:  # nobody could watch it
            child.kill()
            child.wait()
            raise
        return WatchedProcess(self.reactor, child.pid, pidfd, child)

    def keep_spare(self) -> None:
        self._launcher.keep_spare()

    def hand_over(
        self, core: int, kind: str, socks: Sequence[socket.socket], **fields: Any
    ) -> None:
        path = descriptor_socket(self._runtime.path, core)
        send_descriptors(path, [sock.fileno() for sock in socks], encode(kind, **fields))

    # --- the kernel ---

    def socket_pair(self) -> tuple[socket.socket, socket.socket]:
        pair = socket.socketpair()
        for end in pair:
            # What may be on its way is the sender's affair: a unix socket's SO_RCVBUF does nothing.
            try:
                end.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, self._socket_buffer)
            except PermissionError:  # without CAP_NET_ADMIN the host's maximum holds
                end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._socket_buffer)
        return pair

    attach = staticmethod(device.attach)
    adopt = staticmethod(device.adopt)
    claims = staticmethod(device.claims)
    held = staticmethod(device.held)

    def call(
        self,
        name: str,
        seconds: float,
        function: Callable[[], Result],
        done: Callable[[Result | None, Exception | None], None],
        late: Callable[[Result], None] | None = None,
    ) -> Call:
        return BlockingCall(self.reactor, name, seconds, function, done, late)

    # --- what is kept ---

    def save(self, state: bytes) -> None:
        self._runtime.save(state)

    def outdate(self) -> None:
        self._runtime.outdate()

    def leftovers(self) -> list[tuple[str, str]]:
        found: list[tuple[str, str]] = []
        for backend in registry.names():
            try:
                names = registry.backend(backend).leftovers(self.instance)
            except ReactorError as error:
                log.debug("%s", error)
            else:
                found += [(backend, name) for name in names]
        return found

    def discard(self, backend: str, disk: str) -> None:
        registry.backend(backend).discard(disk, self.instance)

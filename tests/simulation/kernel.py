"""The kernel's nbd driver: what is attached, what is in flight, and what becomes of it.

By netlink as drivers/block/nbd.c of Linux 6.1 does it: a request that was sent is sent again only
when the block layer's timer asks about it and its socket was replaced; with several sockets or a
timeout the timer also ends the socket. One that finds no live socket waits for `dead_timeout`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from reactor.errors import DeviceError
from reactor.protocol.wire import NBD_FLAG_READ_ONLY
from tests.simulation.causes import Causes
from tests.simulation.storage import Storage
from tests.simulation.streams import End, Side
from tests.simulation.world import Event, World

NOTICE_SECONDS: Final = 0.1  # until a closed socket is known to be dead, at most
SEVERAL_TIMEOUT: Final = 10
DEFAULT_IO_TIMEOUT: Final = 30.0
STUCK_PAUSE: Final = 0.05

Kind: TypeAlias = Literal["read", "write", "flush"]


@dataclass(eq=False, slots=True)
class Request:
    """One request of an application, from its submission to its end."""

    kind: Kind
    block: int
    value: int
    done: Callable[[int, int], None]  # (errno or 0, value)
    cpu: int = 0
    cookie: int = 0
    socket: Socket | None = None  # over which it was sent
    timer: Event | None = None
    ended: bool = False


class Socket:
    """One of a device's sockets."""

    def __init__(self, device: KernelDevice, side: Side) -> None:
        self.side = side
        self.dead = False
        side.references += 1
        side.stream.device = device
        side.on_data = self._receive
        side.on_hangup = self._notice_later
        self._device = device
        if side.peer.closed:
            self._notice_later()

    def mark_dead(self) -> None:
        """Use it no more."""
        if not self.dead:
            self.dead = True
            self.side.drop()
            self._device.lost_a_socket()

    def _notice_later(self) -> None:
        world = self._device.world
        world.soon(NOTICE_SECONDS if world.chance(0.2) else 0.003, self.mark_dead)

    def _receive(self) -> None:
        while self.side.inbox and not self.dead:
            request, cookie, error, value = self.side.inbox.popleft()
            if request.cookie == cookie and not request.ended:
                self._device.end(request, error, value)


class KernelDevice:
    """One /dev/nbdN."""

    def __init__(self, world: World, index: int) -> None:
        self.world = world
        self.index = index
        self.path = f"/dev/nbd{index}"
        self.openers: dict[Any, None] = {}
        self.was_ioctl = False  # when it was attached last
        self.gave_up_at = -1  # ns, when `dead_timeout` passed for a request
        self.reset()

    def reset(self) -> None:
        """Be as before it was configured."""
        self.tag = ""
        self.way: Literal["netlink", "ioctl"] = "netlink"
        self.configured = self.disconnected = False
        self.size = self.block_size = 0
        self.readonly = False
        self.storage: Storage | None = None  # from which the first request was answered
        self.sockets: list[Socket] = []
        self.waiting: dict[Request, Event] = {}  # for a live socket
        self.in_flight: dict[Request, None] = {}
        self.timeout = 0.0
        self.dead_timeout = 0.0
        self.io_timeout = DEFAULT_IO_TIMEOUT

    @property
    def serving(self) -> bool:
        """Whether it takes I/O."""
        return self.configured and not self.disconnected

    @property
    def is_stuck(self) -> bool:
        """Whether something that was sent is not read by the worker that should."""
        return any(
            not s.dead and not s.side.peer.closed and s.side.peer.inbox for s in self.sockets
        )

    @property
    def disk(self) -> str:
        """The name of the disk, from the tag."""
        return self.tag.rpartition(":")[2]

    # --- requests ---

    def submit(self, request: Request) -> None:
        """Begin a request; its `done` may come at once."""
        if not self.serving:
            self.end(request, errno.EIO, 0)
            return
        socket = self._pick(request.cpu)
        if socket is None:
            if self.way == "ioctl" or not self.dead_timeout:
                self.end(request, errno.EIO, 0)
                return
            self.waiting[request] = self.world.after(self.dead_timeout, self._give_up, request)
            return
        self._send(socket, request)

    def end(self, request: Request, error: int, value: int) -> None:
        """Answer the application."""
        if request.ended:
            return
        request.ended = True
        self.in_flight.pop(request, None)
        waiting = self.waiting.pop(request, None)
        for event in (waiting, request.timer):
            if event is not None:
                event.cancel()
        request.done(error, value)

    def _pick(self, cpu: int) -> Socket | None:
        live = [socket for socket in self.sockets if not socket.dead]
        if not live:
            return None
        preferred = self.sockets[cpu % len(self.sockets)]
        return live[0] if preferred.dead else preferred

    def _send(self, socket: Socket, request: Request) -> None:
        request.cookie += 1
        request.socket = socket
        self.in_flight[request] = None
        request.timer = self.world.after(self._request_seconds(), self._timed_out, request)
        if not socket.side.send((request, request.cookie)):
            self.world.soon(0.001, socket.mark_dead)

    def _request_seconds(self) -> float:
        # The timer is coarse.
        return (self.timeout or self.io_timeout) + self.world.between(0, 1)

    def _timed_out(self, request: Request) -> None:
        socket = request.socket
        assert socket is not None
        if self.way == "ioctl":
            self.end(request, errno.EIO, 0)
            self.shut_down()
            return
        if self.timeout or len(self.sockets) > 1:
            if not socket.dead:
                self.world.note("%s: connection timed out, retrying", self.path)
                socket.mark_dead()
        elif socket in self.sockets:  # not replaced: asked again later
            request.timer = self.world.after(self._request_seconds(), self._timed_out, request)
            return
        self.in_flight.pop(request, None)
        self.submit(request)

    def lost_a_socket(self) -> None:
        """By ioctl the device ends with its socket, a little later."""
        if self.way == "ioctl" and self.serving:
            self.world.soon(0.02, self._end_with_its_socket, self.sockets)

    def _end_with_its_socket(self, sockets: list[Socket]) -> None:
        if self.sockets is sockets and self.serving:
            self.shut_down()

    def _give_up(self, request: Request) -> None:
        self.world.note("%s: dead_timeout has passed", self.path)
        self.gave_up_at = self.world.now
        self.end(request, errno.EIO, 0)

    def resume_waiting(self) -> None:
        """Send what waited for a socket."""
        waiting, self.waiting = self.waiting, {}
        for request, event in waiting.items():
            event.cancel()
            self.submit(request)

    # --- configuration ---

    def change_size(self, size: int) -> None:
        """Have another size; it must not be more than the disk has."""
        self.size = size
        self.world.note("%s has %d bytes", self.path, size)
        for socket in self.sockets:
            storage = socket.side.stream.storage
            if not socket.dead and storage is not None and size > storage.size:
                self.world.violate(f"{self.path} has {size} bytes, {storage} {storage.size}")

    def shut_down(self) -> None:
        """Disconnect it: what is in flight fails, and it stays ours while somebody has it open."""
        self.disconnected = True
        for socket in self.sockets:
            socket.mark_dead()
        for request in [*self.in_flight, *self.waiting]:
            self.end(request, errno.EIO, 0)
        self.release_if_unused()

    def release_if_unused(self) -> None:
        """Forget all of it when nobody has it open."""
        if self.configured and self.disconnected and not self.openers:
            self.world.note("%s is free", self.path)
            self.reset()

    def crash(self) -> None:
        """Be no more, with all that is in flight."""
        for request in [*self.in_flight, *self.waiting]:
            request.ended = True
            for event in (request.timer, self.waiting.get(request)):
                if event is not None:
                    event.cancel()
        self.openers.clear()
        self.reset()

    def close(self, opener: Any) -> None:
        """Let `opener` go."""
        self.openers.pop(opener, None)
        self.release_if_unused()


class Driver:
    """The nbd driver, and its generic netlink lock."""

    def __init__(self, world: World, causes: Causes, devices: int, *, has_netlink: bool) -> None:
        self.world = world
        self._causes = causes
        self.devices = [KernelDevice(world, index) for index in range(devices)]
        self.has_netlink = has_netlink
        self.disconnecting: dict[KernelDevice, None] = {}

    def configured(self) -> list[KernelDevice]:
        """Return the devices that somebody configured."""
        return [device for device in self.devices if device.configured]

    def connect(
        self,
        device: str,
        *,
        way: Literal["netlink", "ioctl"],
        tag: str,
        size: int,
        block_size: int,
        flags: int,
        kernel_ends: Sequence[End],
        timeout: int | None,
        dead_timeout: int,
    ) -> KernelDevice:
        """Configure a device; raises DeviceError."""
        free = [d for d in self.devices if not d.configured and not d.openers]
        found = next((d for d in free if device in ("auto", d.path)), None)
        if found is None:
            in_use = f"{device} is in use"
            self._causes.strike(tag.rpartition(":")[2], in_use)
            raise DeviceError(errno.EBUSY, in_use)
        for other in self.configured():
            if other.disk == tag.rpartition(":")[2] and not other.disconnected:
                self.world.violate(f"{tag} is attached twice: {other.path} and {found.path}")
        found.configured, found.tag, found.way = True, tag, way
        found.was_ioctl = way == "ioctl"
        found.size, found.block_size = size, block_size
        found.readonly = bool(flags & NBD_FLAG_READ_ONLY)
        found.dead_timeout = dead_timeout
        if way == "ioctl":
            found.timeout = 60 if timeout is None else timeout
        else:
            found.timeout = timeout or (SEVERAL_TIMEOUT if len(kernel_ends) > 1 else 0)
        found.sockets = [Socket(found, end.side) for end in kernel_ends]
        self.world.note("%s is attached as %s, %d bytes", found.path, tag, size)
        return found

    def reconfigure(self, device: KernelDevice, kernel_ends: Sequence[End]) -> None:
        """Replace dead sockets, in their order; what finds none is dropped without an error."""
        ends = list(kernel_ends)
        for number, socket in enumerate(device.sockets):
            if socket.dead and ends:
                device.sockets[number] = Socket(device, ends.pop(0).side)
                self.world.note("%s has a new socket %d", device.path, number)
        device.resume_waiting()

    def disconnect(self, device: KernelDevice) -> None:
        """Shut a device down, once its workers have read what was sent; until then all wait."""
        if device.is_stuck and not device.disconnected:
            self.disconnecting[device] = None
            self.world.after(STUCK_PAUSE, self.disconnect, device)
            return
        self.disconnecting.pop(device, None)
        if device.serving:
            self.world.note("%s is disconnected", device.path)
            device.shut_down()

    def crash(self) -> None:
        """Be loaded anew: what is on its way to the devices of before finds them nowhere."""
        for device in self.devices:
            device.crash()
        self.devices = [KernelDevice(self.world, device.index) for device in self.devices]
        self.disconnecting.clear()

    @property
    def is_locked(self) -> bool:
        """Whether a disconnect holds the lock of all generic netlink."""
        return bool(self.disconnecting)

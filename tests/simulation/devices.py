"""The devices of the driver as the controller has them: the interface of `reactor.attach.block`."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, Literal

from reactor.errors import DeviceError
from tests.simulation.kernel import Driver, KernelDevice, Kind, Request
from tests.simulation.streams import End
from tests.simulation.world import NS

RELEASE_SECONDS: Final = 5.0  # for which a detach waits for those who have the device open
STOP_SECONDS: Final = 10.0  # after which an ioctl device's connection is cut


class Waits(Exception):
    """The call cannot return yet; `again` is to be called in its place, a little later."""

    def __init__(self, again: Callable[[], Any]) -> None:
        super().__init__()
        self.again = again


class SimulatedDevice:
    """What both ways share. Every call may raise `Waits`."""

    way: Literal["netlink", "ioctl"]
    can_reconnect: bool

    def __init__(self, driver: Driver, kernel: KernelDevice) -> None:
        self.index = kernel.index
        self.path = kernel.path
        self._driver = driver
        self._kernel = kernel
        self._tag = kernel.tag
        self._sockets = kernel.sockets

    def __repr__(self) -> str:
        return self.path

    @property
    def _is_ours(self) -> bool:
        return self._kernel.configured and self._kernel.tag == self._tag

    def probe(self) -> None:
        """Read from the worker."""
        self._do("read", "cannot be read")

    def flush(self) -> None:
        """Flush the disk."""
        self._do("flush", "cannot be flushed")

    def _do(self, kind: Kind, failed: str) -> None:
        ended: list[int] = []
        request = Request(kind, 0, 0, lambda error, _: ended.append(error))
        opener = object()
        self._kernel.openers[opener] = None
        self._kernel.submit(request)

        def wait() -> None:
            if not ended:
                raise Waits(wait)
            self._kernel.close(opener)
            if ended[0]:
                raise DeviceError(ended[0], f"{self.path} {failed}")

        wait()

    def is_held(self) -> bool:
        """Whether the driver still has it as it was."""
        return self._kernel.configured and self._kernel.sockets is self._sockets

    def _await_release(self, since: int) -> None:
        if not self.is_held():
            return
        if self._driver.world.now - since > RELEASE_SECONDS * NS:
            raise DeviceError(errno.EBUSY, f"{self.path} is disconnected, but stays in use")
        raise Waits(partial(self._await_release, since))


class NetlinkDevice(SimulatedDevice):
    """A device that the kernel holds under a tag."""

    way = "netlink"
    can_reconnect = True

    def reconnect(self, kernel_ends: Sequence[End], worker_ends: Sequence[End]) -> None:
        """Give it new sockets; DeviceError EAGAIN when they were not all taken."""
        try:
            self._check()
        except Waits:
            raise Waits(partial(self.reconnect, kernel_ends, worker_ends)) from None
        except DeviceError:
            _close(kernel_ends)
            raise
        self._driver.reconfigure(self._kernel, kernel_ends)
        _close(kernel_ends)
        if any(end.side.peer.closed for end in worker_ends):
            raise DeviceError(errno.EAGAIN, f"{self.path} has not noticed yet")

    def resize(self, size: int, block_size: int) -> None:
        """Tell the kernel the size."""
        try:
            self._check()
        except Waits:
            raise Waits(partial(self.resize, size, block_size)) from None
        if self._kernel.size != size:
            self._kernel.change_size(size)

    def detach(self) -> None:
        """Disconnect it and wait until it is free."""
        if self._driver.is_locked:
            raise Waits(self.detach)
        if not self._kernel.configured:
            return
        if not self._is_ours:
            raise DeviceError(errno.EBUSY, f"{self.path} belongs to another now")
        self._driver.disconnect(self._kernel)
        self._disconnected()

    def _disconnected(self) -> None:
        if self._kernel in self._driver.disconnecting:
            raise Waits(self._disconnected)
        self._await_release(self._driver.world.now)

    def _check(self) -> None:
        if self._driver.is_locked:
            raise Waits(self._check)
        if not self._kernel.configured:
            raise DeviceError(errno.ENODEV, f"{self.path} is not attached any more")
        if not self._is_ours:
            raise DeviceError(errno.EBUSY, f"{self.path} belongs to another now")
        if self._kernel.disconnected:
            raise DeviceError(errno.EBUSY, f"{self.path} is disconnected, but stays in use")


class IoctlDevice(SimulatedDevice):
    """A device that ends with its controller."""

    way = "ioctl"
    can_reconnect = False

    def reconnect(self, kernel_ends: Sequence[End], worker_ends: Sequence[End]) -> None:
        """Refuse."""
        _close(kernel_ends)
        raise DeviceError(errno.EOPNOTSUPP, f"{self.path} is attached by ioctl")

    def resize(self, size: int, block_size: int) -> None:
        """Tell the kernel the size."""
        if not self._is_live:
            raise DeviceError(errno.ENODEV, f"{self.path} is not attached any more")
        self._kernel.change_size(size)

    def detach(self) -> None:
        """Ask the worker to end its connection, cut it, and wait until the device is free."""
        if self._is_live:
            for socket in self._sockets:
                socket.side.send(None)
        self._cut(self._driver.world.now)

    def end_with_controller(self) -> None:
        """Go, as the thread that held it does."""
        if self._is_live:
            self._kernel.shut_down()

    @property
    def _is_live(self) -> bool:
        return self._kernel.serving and self._kernel.sockets is self._sockets

    def _cut(self, since: int) -> None:
        if self._is_live:
            if self._driver.world.now - since <= STOP_SECONDS * NS:
                raise Waits(partial(self._cut, since))
            self._kernel.shut_down()
        self._await_release(self._driver.world.now)


def _close(ends: Sequence[End]) -> None:
    for end in ends:
        end.close()

"""A connection of the kernel to a worker: it does what it is asked, each thing once at a time."""

from __future__ import annotations

import errno
from functools import partial
from typing import TYPE_CHECKING, Final

from tests.simulation.kernel import KernelDevice, Request
from tests.simulation.streams import End

if TYPE_CHECKING:
    from tests.simulation.worker import ServedDisk

FENCE_SECONDS: Final = 0.01  # until who waits for an earlier copy of a request looks again


class Connection:
    """One of the kernel's connections."""

    def __init__(self, disk: ServedDisk, end: End, generation: int, position: int) -> None:
        self.disk = disk
        self.generation = generation
        self.position = position
        self.closed = False
        self._end = end
        self._draining = False
        self._busy = 0  # operations under way
        end.side.stream.serve(disk.spec.name, generation, disk.storage)
        end.side.on_data = end.side.on_hangup = self.wake

    def drain(self, seconds: float) -> None:
        """Read no more, finish what is in flight, close; at once after so long."""
        self._draining = True
        process = self.disk.worker.process
        process.world.after(seconds, process.run, self.close)
        self._close_if_drained()

    def close(self) -> None:
        """Close it and tell."""
        if not self.closed:
            self.closed = True
            self._end.close()
            self.disk.connection_closed(self)

    def wake(self) -> None:
        """Look what has come."""
        self.disk.worker.process.run(self._read)

    def _read(self) -> None:
        side = self._end.side
        if side.peer.closed:  # the kernel sends it elsewhere
            side.inbox.clear()
        while side.inbox and not self.closed and not self._draining:
            message = side.inbox.popleft()
            if message is None:  # NBD_CMD_DISC
                self.drain(0.5)
            else:
                self._begin(*message)
        if side.peer.closed and not side.inbox and not self._draining:
            self._draining = True
            self._close_if_drained()

    def _begin(self, request: Request, cookie: int) -> None:
        disk = self.disk
        if disk.refusing:
            self._end.side.send((request, cookie, errno.ESHUTDOWN, 0))
            return
        process = disk.worker.process
        if request.kind == "write" and process.host.does(request):
            again = partial(self._begin_unless_closed, request, cookie)
            process.world.after(FENCE_SECONDS, process.run, again)
            return
        disk.check_device(self)
        self._busy += 1
        value = request.value

        def land() -> None:
            found = disk.storage.blocks.get(request.block, 0)
            if request.kind == "write":
                disk.storage.blocks[request.block] = value
            elif request.kind == "flush":
                disk.storage.flush()
            process.run(lambda: self._finish(request, cookie, found))

        process.operate(disk.storage, land, request)

    def _begin_unless_closed(self, request: Request, cookie: int) -> None:
        if not (self.closed or self._end.side.peer.closed):
            self._begin(request, cookie)

    def _finish(self, request: Request, cookie: int, value: int) -> None:
        self._busy -= 1
        self._end.side.send((request, cookie, 0, value))
        self._close_if_drained()
        self.disk.operation_ended()

    @property
    def device(self) -> KernelDevice | None:
        """The device at the other end."""
        return self._end.side.stream.device

    def serves(self, device: KernelDevice) -> bool:
        """Whether the device still has the other end."""
        kernel = self._end.side.peer
        return device.serving and any(socket.side is kernel for socket in device.sockets)

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return self._busy == 0

    def _close_if_drained(self) -> None:
        if self._draining and not self._busy:
            self.close()

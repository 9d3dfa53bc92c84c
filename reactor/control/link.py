"""The kernel device of a disk, and the sockets between it and the disk's worker."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from reactor.attach.device import Device, attach
from reactor.control.blocking import BlockingCall
from reactor.control.errand import Errand
from reactor.control.workers import WorkerProcess
from reactor.errors import DeviceError, reason
from reactor.log import logger
from reactor.loop import Reactor
from reactor.messages import Message
from reactor.spec import DiskSpec

ATTACH_SECONDS: Final = 30.0
PROBE_SECONDS: Final = 30.0
FLUSH_SECONDS: Final = 60.0
DETACH_SECONDS: Final = 30.0
DRAIN_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 5.0  # what an answer may take beyond the work itself
RETRY_SECONDS: Final = 0.05
TRIES_MAX: Final = 200
TRIES_PER_COUNT: Final = 10
HANDOVER_TRIES: Final = 200
STEADY_SECONDS: Final = 10.0  # a connection that lasted so long was a good one
SOCKET_BUFFER: Final = 4 << 20  # bytes each way between kernel and worker; the host may cap it

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the kernel is told of a disk. Sizes in bytes, flags of the transmission phase."""

    size: int = 0
    block_size: int = 0
    flags: int = 0


class DeviceLink:
    """At most one device. Each method begins one thing on the disk's errand.

    `linked`: the worker serves the device; `probed`: a read has come through; `fitted`: the kernel
    has the disk's size.
    """

    def __init__(
        self,
        reactor: Reactor,
        errand: Errand,
        worker: WorkerProcess,
        on_failed: Callable[[Exception], None],
    ) -> None:
        self.device: Device | None = None
        self.linked = False
        self.probed = False
        self.flushed = False
        self.fitted = False
        self._reactor = reactor
        self._errand = errand
        self._worker = worker
        self._on_failed = on_failed
        self._disk = ""
        self._generation = 0
        self._attached_generation = 0  # the first of this attachment
        self._lost = 0  # connections that must be replaced
        self._detaching = False
        self._tries = 0
        self._linked_ns = 0

    @property
    def path(self) -> str | None:
        """The device that is attached."""
        return self.device.path if self.device is not None else None

    @property
    def serving(self) -> bool:
        """Whether nothing is amiss: there is no device, or its worker serves it."""
        return self.device is None or self.linked

    def forgive(self) -> None:
        """Begin to count failures anew."""
        self._tries = 0

    def stay(self) -> None:
        """Note that the device stays: what was written back is not all that will be."""
        self.flushed = False

    def worker_lost(self, spec: DiskSpec) -> None:
        """Note that the worker's ends of all sockets are gone."""
        self.linked = False
        self._lost = spec.connections

    def connection_lost(self, generation: int) -> None:
        """Note that one connection ended while its worker lives."""
        expected = self.device is None or self._errand.awaits("released") or self._detaching
        if generation < self._attached_generation or expected:
            return
        log.warning("device %s lost a connection", self.path)
        self.linked = False
        self._lost += 1
        if (self._reactor.clock() - self._linked_ns) / 1e9 > STEADY_SECONDS:
            self._tries = 0

    def adopt(self, device: Device, spec: DiskSpec) -> None:
        """Take over a device that the kernel still holds; it carried I/O before."""
        self.device = device
        self.probed = True
        self.fitted = False
        self._disk = spec.name
        self._lost = spec.connections

    def attach(self, spec: DiskSpec, tag: str, geometry: Geometry) -> None:
        """Attach what `spec` asks for, and give the worker its ends."""
        wanted = spec.device
        assert wanted is not None
        kernel_ends, worker_ends = _socket_pairs(spec.connections)
        asked = self._worker.pid
        self._disk = spec.name

        def attach_it() -> Device:
            return attach(
                wanted,
                spec.attach,
                tag=tag,
                size=geometry.size,
                block_size=geometry.block_size,
                flags=geometry.flags,
                kernel_ends=kernel_ends,
                timeout=spec.timeout,
                dead_timeout=spec.dead_timeout,
            )

        def attached(device: Device | None, error: Exception | None) -> None:
            if device is None:
                _close_all(worker_ends)
                assert error is not None
                self._on_failed(error)
                return
            self.device = device
            self.probed = self.flushed = False
            self.fitted = True
            self._attached_generation = self._generation + 1
            self._lost = len(worker_ends)
            self._hand_over(worker_ends, asked)

        name = f"attaching {wanted} to disk {spec.name}"
        self._errand.call(name, ATTACH_SECONDS, attach_it, attached, late=self._detach_late)

    def reconnect(self, device: Device) -> None:
        """Give the device new sockets for those that were lost."""
        if not device.can_reconnect:
            # By ioctl the kernel's thread is gone with its socket: only a new attach helps.
            self.detach(device)
            return
        self._tries += 1
        if self._tries > TRIES_MAX:
            message = f"{device.path} lost its connection {TRIES_MAX} times in short order"
            self._on_failed(DeviceError(errno.EIO, message))
            return
        kernel_ends, worker_ends = _socket_pairs(max(self._lost, 1))
        asked = self._worker.pid

        def reconnected(_: None, error: Exception | None) -> None:
            if error is None:
                log.info("disk %s: device %s has a new socket", self._disk, device.path)
                self._hand_over(worker_ends, asked)
                return
            _close_all(worker_ends)
            if isinstance(error, DeviceError) and error.errno == errno.EAGAIN:
                # Either the kernel has not noticed yet, or it has fewer sockets than we offer.
                if self._lost > 1 and self._tries % TRIES_PER_COUNT == 0:
                    self._lost -= 1
                self._errand.pause(RETRY_SECONDS)
            else:
                self._on_failed(error)

        self._errand.call(
            f"reconnecting {device.path}",
            ATTACH_SECONDS,
            lambda: device.reconnect(kernel_ends, worker_ends),
            reconnected,
        )

    def probe(self, device: Device) -> None:
        """Read from the device: only then is it known to work."""

        def probed(_: None, error: Exception | None) -> None:
            if error is not None:
                self._on_failed(error)
            else:
                self.probed = True

        self._errand.call(
            f"reading {device.path}", PROBE_SECONDS, device.probe, probed, needs_worker=True
        )

    def fit(self, device: Device, geometry: Geometry) -> None:
        """Tell the kernel the size of a disk that may have changed while nobody served it."""

        def fitted(_: None, error: Exception | None) -> None:
            self.fitted = True
            if error is not None:
                self._on_failed(error)

        self._errand.call(
            f"resizing {device.path}",
            ATTACH_SECONDS,
            lambda: device.resize(geometry.size, geometry.block_size),
            fitted,
        )

    def release(self, device: Device, *, write_back: bool) -> None:
        """Do the next thing on the way to no device."""
        if not self.linked:
            if write_back and not self.flushed:
                log.error(
                    "disk %s: what was not yet written back from %s is lost: no worker serves it",
                    *(self._disk, device.path),
                )
            self.detach(device)
        elif not self._worker.healthy:
            self._worker.kill(f"{device.path} must be detached and it does not answer")
        elif write_back and not self.flushed:
            self._flush(device)
        else:
            self._close_connections()

    def detach(self, device: Device) -> None:
        """Take the device from the kernel."""

        def detached(_: None, error: Exception | None) -> None:
            self.device = None
            self.probed = self._detaching = False
            if error is not None:
                log.error("disk %s: %s", self._disk, reason(error))

        self.linked = False
        self._detaching = True
        self._lost = 0
        self._errand.call(f"detaching {device.path}", DETACH_SECONDS, device.detach, detached)

    def _close_connections(self) -> None:
        """Have the worker finish what is in flight and close its ends.

        DISCONNECT to a device whose worker does not read (because its storage hangs, say) blocks
        in the kernel for ever and holds the lock of all generic netlink; to dead sockets it cannot.
        """

        def closed(_message: Message) -> None:
            self.linked = False

        self._errand.ask(
            "release",
            "released",
            DRAIN_SECONDS + ANSWER_SECONDS,
            closed,
            self._worker.kill,
            disk=self._disk,
            seconds=DRAIN_SECONDS,
        )

    def _flush(self, device: Device) -> None:
        def flushed(_: None, error: Exception | None) -> None:
            self.flushed = True
            if error is not None:
                log.error("disk %s: %s", self._disk, reason(error))

        self._errand.call(
            f"writing back {device.path}", FLUSH_SECONDS, device.flush, flushed, needs_worker=True
        )

    def _hand_over(
        self, worker_ends: Sequence[socket.socket], asked: int | None, tries: int = HANDOVER_TRIES
    ) -> None:
        """Give the worker its ends and keep none, so that its death is seen by the kernel.

        `asked` is the worker that has the disk open; to a later one the ends mean nothing yet.
        """
        if self._worker.pid is None or self._worker.pid != asked:
            _close_all(worker_ends)
            return
        self._generation += 1
        try:
            self._worker.hand_over(
                "connection",
                [end.fileno() for end in worker_ends],
                disk=self._disk,
                generation=self._generation,
            )
        except BlockingIOError:  # its queue is full (net.unix.max_dgram_qlen)
            if tries:
                again = partial(self._hand_over, worker_ends, asked, tries - 1)
                self._errand.pause(RETRY_SECONDS, again)
                return
            log.warning("disk %s: worker core %d takes no sockets", self._disk, self._worker.core)
        except OSError as error:
            # The worker died; the kernel sees its link dead, and the next step tries again.
            log.warning("disk %s: handing over a socket: %s", self._disk, reason(error))
            self._errand.pause(RETRY_SECONDS)
        else:
            self._lost -= len(worker_ends)
            self.linked = self._lost <= 0
            self._linked_ns = self._reactor.clock()
        _close_all(worker_ends)

    def _detach_late(self, device: Device) -> None:
        """Undo an attach that came through after its deadline."""
        log.warning("%s was attached too late and is detached again", device.path)

        def detached(_: None, error: Exception | None) -> None:
            if error is not None:
                log.error("disk %s: %s", self._disk, reason(error))

        name = f"detaching {device.path}"
        BlockingCall(self._reactor, name, DETACH_SECONDS, device.detach, detached)


def _socket_pairs(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(count)]
    for end in (end for pair in pairs for end in pair):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    return [kernel for kernel, _ in pairs], [worker for _, worker in pairs]


def _close_all(ends: Sequence[socket.socket]) -> None:
    for end in ends:
        end.close()

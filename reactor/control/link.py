"""The kernel device of a disk, and the sockets between it and the disk's workers."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, TypeAlias

from reactor.attach.device import Device
from reactor.control.errand import Errand
from reactor.control.freeing import DETACH_SECONDS, free
from reactor.control.platform import Platform
from reactor.control.share import Share
from reactor.control.shares import DRAIN_SECONDS, Geometry
from reactor.control.slots import Delivery, Ends, Slot, drop, server, socket_pairs
from reactor.control.tags import tag
from reactor.control.workers import WorkerProcess
from reactor.errors import DeviceError, is_shortage, reason
from reactor.log import logger
from reactor.messages import Message
from reactor.spec import DiskSpec

ATTACH_SECONDS: Final = 30.0
PROBE_SECONDS: Final = 30.0
FLUSH_SECONDS: Final = 60.0
RETRY_SECONDS: Final = 0.05
SHORTAGE_SECONDS: Final = 1.0
DYING_SECONDS: Final = 1.0  # from one try to reach a worker that is dying to the next
TRIES_AT_ONCE: Final = 200
SOCKET_TRIES: Final = 10
TRIES_PER_COUNT: Final = 10
HANDOVER_TRIES: Final = 200  # while a queue is full (net.unix.max_dgram_qlen), say
PROBES_MAX: Final = 5
STEADY_SECONDS: Final = 10.0  # a connection that lasted so long was a good one

#: How a device answers that is being detached, or was and is still open.
GONE: Final = (errno.ENODEV, errno.EBUSY)

OnFailed: TypeAlias = Callable[[Exception], None]

log = logger(__name__)


class DeviceLink:
    """At most one device. Each method begins one thing on the disk's errand.

    `shares` has the share whose worker each connection is meant for. `probed`: a read has come
    through; `fitted`: the kernel has the disk's size.
    """

    def __init__(
        self,
        platform: Platform,
        errand: Errand,
        shares: Sequence[Share],
        on_failed: OnFailed,
    ) -> None:
        self.device: Device | None = None
        self.probed = False
        self.flushed = False
        self.fitted = False
        self._platform = platform
        self._reactor = platform.reactor
        self._errand = errand
        self._shares = shares
        self._on_failed = on_failed
        self._disk = ""
        self._slots: list[Slot] = []  # in the kernel's order
        self._generation = 0
        self._detaching = False
        self._left: Device | None = None  # it had this one, which others still have open
        self._adopted = False  # an earlier controller attached it, with so many sockets as it knew
        self._tries = self._tries_for_sockets = self._failed_probes = 0
        self._tried_ns = self._first_tried_ns = 0
        self._dead_timeout = 0  # seconds for which the kernel holds I/O
        self._waited = 0.0  # seconds, for calls that did not finish
        self._linked_ns = 0

    @property
    def path(self) -> str | None:
        """The device that is attached."""
        return self.device.path if self.device is not None else None

    @property
    def linked(self) -> bool:
        """Whether every socket is served."""
        return all(slot.share is not None for slot in self._slots)

    @property
    def usable(self) -> bool:
        """Whether some socket is served; the kernel sends there what it cannot send elsewhere."""
        return bool(self._serving())

    @property
    def serving(self) -> bool:
        """Whether nothing is amiss: there is no device, or it is served as it should be."""
        return self.device is None or self.linked

    def hindrance(self, wanted: str | None) -> str:
        """Return why the device that it had cannot be attached again yet; empty: it can."""
        if self._left is None or self._left.path != wanted or not self._left.is_held():
            return ""
        return f"waits for those who have {wanted} open to let it go"

    def forgive(self) -> None:
        """Begin to count failures anew."""
        self._tries = self._tries_for_sockets = self._failed_probes = 0

    def stay(self) -> None:
        """Note that the device stays: what was written back is not all that will be."""
        self.flushed = False

    def worker_lost(self, share: Share) -> None:
        """Note that the worker's ends of all its sockets are gone."""
        self.fitted = False  # until it is opened again the storage may change
        for slot in self._slots:
            if slot.share is share:
                self._lose(slot)

    def connection_lost(self, generation: int) -> None:
        """Note that one connection ended while its worker lives."""
        if self.device is None or self._errand.awaits("released") or self._detaching:
            return
        for slot in self._slots:
            if slot.generation == generation and slot.share is not None:
                say = log.info if self._errand.awaits("stopped") else log.warning
                say("device %s lost a connection to core %d", self.path, slot.share.worker.core)
                self._lose(slot)
        if not self.usable:
            self._errand.connections_lost()

    def adopt(self, device: Device, spec: DiskSpec) -> None:
        """Take over a device that the kernel still holds; it carried I/O before."""
        self.device, self.fitted = device, False
        self.probed = self._adopted = True
        self._disk = spec.name
        self._dead_timeout = spec.dead_timeout
        self._slots = self._new_slots()

    def found(self, share: Share, connections: Iterable[tuple[int, int]], asked_ns: int) -> None:
        """Note which (generation, position) the worker serves, as it was when it was asked."""
        living = {position: generation for generation, position in connections}
        for position, slot in enumerate(self._slots):
            if slot.handed_ns > asked_ns:
                continue  # later than what the worker says
            if position in living:
                slot.share = share
                slot.generation = living[position]
            elif slot.share is share:
                self._lose(slot)

    def attach(self, spec: DiskSpec, geometry: Geometry, on_failed: OnFailed) -> None:
        """Attach what `spec` asks for, and give the workers their ends."""
        wanted = spec.device
        assert wanted is not None
        slots = self._new_slots()
        self._disk = spec.name
        self._dead_timeout = spec.dead_timeout
        pairs = self._socket_pairs(slots)
        if pairs is None:
            return
        kernel_ends, deliveries = pairs

        def attach_it() -> Device:
            return self._platform.attach(
                wanted,
                spec.attach,
                tag=tag(self._platform.instance, spec),
                size=geometry.size,
                block_size=geometry.block_size,
                flags=geometry.flags,
                kernel_ends=kernel_ends,
                timeout=spec.timeout,
                dead_timeout=spec.dead_timeout,
            )

        def attached(device: Device | None, error: Exception | None) -> None:
            if device is None:
                drop(deliveries)
                assert error is not None
                on_failed(error)
                return
            self.device, self.fitted = device, True
            self.probed = self.flushed = self._adopted = False
            self._slots = slots
            self._hand_over(deliveries)

        name = f"attaching {wanted} to disk {spec.name}"
        self._errand.call(name, ATTACH_SECONDS, attach_it, attached, late=self._detach_late)

    def mend(self, device: Device, geometry: Geometry) -> None:
        """Do the next thing that the device needs to serve, if there is one that can be done."""
        changeable = self.linked or device.can_reconnect
        if not self.fitted and changeable and any(share.opened for share in self._shares):
            self._fit(device, geometry)  # first: it may have blocks that the disk has no more
        elif not self.reconnect(device) and self.linked and not self.probed:
            self._probe(device)

    def reconnect(self, device: Device) -> bool:
        """Give the device new sockets for those that were lost and can be served; False if none."""
        lost = self._lost()
        if not any(server(self._shares, slot.place).opened for slot in lost):
            return False
        self._reconnect(device, lost)
        return True

    def _reconnect(self, device: Device, lost: Sequence[Slot]) -> None:
        if not device.can_reconnect:
            # By ioctl the kernel's thread is gone with its socket: only a new attach helps.
            self.detach(device)
            return
        if self._tries >= TRIES_AT_ONCE and self._rests(device):
            return
        # The kernel replaces its dead sockets in their order. So the first are for the workers
        # that are there, each at its own place if it can be.
        for slot, place in zip(lost, sorted((s.place for s in lost), key=self._order), strict=True):
            slot.place = place
        mended = [slot for slot in lost if server(self._shares, slot.place).opened]
        pairs = self._socket_pairs(mended)
        if pairs is None:
            return
        self._tried_ns = self._reactor.clock()
        self._first_tried_ns = self._first_tried_ns if self._tries else self._tried_ns
        self._tries += 1
        kernel_ends, deliveries = pairs
        worker_ends = [delivery.end for delivery in deliveries]

        def reconnected(_: None, error: Exception | None) -> None:
            if error is None:
                log.info("disk %s: device %s has a new socket", self._disk, device.path)
                self._waited = 0.0
                self._hand_over(deliveries)
                return
            drop(deliveries)
            if isinstance(error, DeviceError) and error.errno == errno.EAGAIN:
                # Either the kernel has not noticed yet, or it has fewer sockets than we think.
                if self._adopted and len(self._slots) > 1 and self._tries % TRIES_PER_COUNT == 0:
                    self._slots.remove(mended[-1])
                self._errand.pause(RETRY_SECONDS)
            elif not self._waits(error, ATTACH_SECONDS):
                self._refused(device, error)

        self._errand.call(
            f"reconnecting {device.path}",
            ATTACH_SECONDS,
            lambda: device.reconnect(kernel_ends, worker_ends),
            reconnected,
        )

    def _rests(self, device: Device) -> bool:
        """Pause from one try to the next, or fail when I/O has waited for as long as it may.

        Its workers may lack the memory for a connection, as all that tells of a shortage.
        """
        now = self._reactor.clock()
        seconds = (now - self._first_tried_ns) / 1e9
        if seconds >= self._dead_timeout:
            message = f"{device.path} lost its connection {self._tries} times in {seconds:.0f} s"
            self._on_failed(DeviceError(errno.EIO, message))
            return True
        pause = SHORTAGE_SECONDS - (now - self._tried_ns) / 1e9
        if pause > 0:
            self._errand.pause(pause)
        return pause > 0

    def _probe(self, device: Device) -> None:
        """Read from the device: only then is it known to work."""

        def probed(_: None, error: Exception | None) -> None:
            if error is None:
                self.probed = True
                self._failed_probes, self._waited = 0, 0.0
                return
            if self._waits(error, PROBE_SECONDS):
                return
            self._failed_probes += not is_shortage(error)
            if device.can_reconnect or is_shortage(error) or self._failed_probes >= PROBES_MAX:
                self._on_failed(error)
                return
            self._attach_anew(device, error)

        self._errand.call(
            f"reading {device.path}", PROBE_SECONDS, device.probe, probed, needs_worker=True
        )

    def _fit(self, device: Device, geometry: Geometry) -> None:
        """Tell the kernel the size of a disk that may have changed while nobody served it."""

        def fitted(error: Exception | None) -> None:
            self.fitted = error is None
            if error is not None and not self._waits(error, ATTACH_SECONDS):
                self._refused(device, error)

        self.resize(device, geometry, fitted)

    def _waits(self, error: Exception, seconds: float) -> bool:
        """Try again if what did not finish in so many seconds is in nobody's way yet.

        The medium hangs, or another program holds the lock of all nbd devices.
        """
        if not isinstance(error, DeviceError) or error.errno != errno.ETIMEDOUT:
            return False
        self._waited += seconds
        if self._waited >= self._dead_timeout:
            return False
        log.warning("disk %s waits: %s", self._disk, reason(error))
        self._errand.pause(RETRY_SECONDS)
        return True

    def _lacks(self, error: Exception | None) -> bool:
        """Try again for as long as I/O would wait if it failed for want of something."""
        if error is None or not is_shortage(error) or self._waited >= self._dead_timeout:
            return False
        self._waited += SHORTAGE_SECONDS
        log.warning("disk %s waits: %s", self._disk, reason(error))
        self._errand.pause(SHORTAGE_SECONDS)
        return True

    def _attach_anew(self, device: Device, error: Exception) -> None:
        """Do so, as by ioctl an error may be the first that shows of a worker's death."""
        log.warning("disk %s: %s is attached anew: %s", self._disk, device.path, reason(error))
        for slot in self._slots:
            slot.share = None
        self._errand.pause(RETRY_SECONDS)

    def _refused(self, device: Device, error: Exception) -> None:
        """Fail; but leave alone a device that another controller had begun to detach."""
        gone = isinstance(error, DeviceError) and error.errno in GONE
        if gone and not device.can_reconnect:
            self._attach_anew(device, error)
        elif gone and self._adopted:
            log.warning("disk %s: another device is attached: %s", self._disk, reason(error))
            self.device, self.probed = None, False
            self._errand.pause(RETRY_SECONDS)
        else:
            self._on_failed(error)

    def resize(
        self, device: Device, geometry: Geometry, done: Callable[[Exception | None], None]
    ) -> None:
        """Tell the kernel another size."""
        self._errand.call(
            f"resizing {device.path}",
            ATTACH_SECONDS,
            lambda: device.resize(geometry.size, geometry.block_size),
            lambda _, error: done(error),
            late=self._resized_late,
        )

    def _resized_late(self, _: None) -> None:
        self.fitted = False  # the kernel has what was given up
        if not self._errand.busy():
            self._errand.pause(0)

    def release(self, device: Device, seconds: float, *, write_back: bool) -> None:
        """Do the next thing on the way to no device; workers have `seconds` to let go of it."""
        serving = self._serving()
        if not serving:
            if write_back and not self.flushed:
                log.error(
                    "disk %s: what was not yet written back from %s is lost: no worker serves it",
                    *(self._disk, device.path),
                )
            self.detach(device)
        elif sick := [share.worker for share in serving if not share.worker.healthy]:
            for worker in sick:
                worker.kill(f"{device.path} must be detached and it does not answer")
        elif write_back and not self.flushed:
            self._flush(device)
        else:
            self._close_connections(serving, seconds)

    def detach(self, device: Device) -> None:
        """Take the device from the kernel."""

        def detached(_: None, error: Exception | None) -> None:
            self._detaching = False
            if self._lacks(error):
                return
            self.device, self.probed = None, False
            self._left = None if device.can_reconnect or error is None else device
            if error is not None:
                log.error("disk %s: %s", self._disk, reason(error))

        for slot in self._slots:
            slot.share = None
        self._detaching = True
        self._errand.call(f"detaching {device.path}", DETACH_SECONDS, device.detach, detached)

    def _close_connections(self, serving: Sequence[Share], seconds: float) -> None:
        """Have the workers finish what is in flight and close their ends.

        DISCONNECT to a device whose worker does not read (because its storage hangs, say) blocks
        in the kernel for ever and holds the lock of all generic netlink; to dead sockets it cannot.
        """

        def closed(worker: WorkerProcess, _message: Message) -> None:
            self.worker_lost(next(share for share in serving if share.worker is worker))

        self._errand.ask(
            [share.worker for share in serving],
            "release",
            "released",
            seconds,
            closed,
            WorkerProcess.kill,
            disk=self._disk,
            seconds=DRAIN_SECONDS,
        )

    def _flush(self, device: Device) -> None:
        def flushed(_: None, error: Exception | None) -> None:
            if self._lacks(error):
                return
            self.flushed = True
            if error is not None:
                log.error("disk %s: %s", self._disk, reason(error))

        self._errand.call(
            f"writing back {device.path}", FLUSH_SECONDS, device.flush, flushed, needs_worker=True
        )

    def _hand_over(self, deliveries: list[Delivery], tries: int = HANDOVER_TRIES) -> None:
        """Give the workers their ends and keep none, so that the kernel sees a worker's death."""
        pause = RETRY_SECONDS
        while deliveries:
            delivery = deliveries[0]
            try:
                self._deliver(delivery)
            except OSError as error:
                if tries and (isinstance(error, BlockingIOError) or is_shortage(error)):
                    again = partial(self._hand_over, deliveries, tries - 1)
                    self._errand.pause(RETRY_SECONDS, again)
                    return
                # The worker died; the kernel sees its link dead, and a later step tries again.
                pause = DYING_SECONDS
                log.warning("disk %s: handing over a socket: %s", self._disk, reason(error))
            delivery.end.close()
            deliveries.pop(0)
        self._linked_ns = self._reactor.clock()
        if not self.linked:
            self._errand.pause(pause)

    def _deliver(self, delivery: Delivery) -> None:
        worker = delivery.share.worker
        if worker.pid is None or worker.pid != delivery.pid:
            return
        slot = delivery.slot
        # Of the clock: higher than any that an earlier controller gave.
        self._generation = max(self._generation + 1, self._reactor.clock() // 1_000_000)
        worker.hand_over(
            "connection",
            [delivery.end],
            disk=self._disk,
            generation=self._generation,
            position=self._slots.index(slot),
        )
        slot.share = delivery.share
        slot.generation = self._generation
        slot.handed_ns = self._reactor.clock()

    def _lose(self, slot: Slot) -> None:
        slot.share = None
        if (self._reactor.clock() - self._linked_ns) / 1e9 > STEADY_SECONDS:
            self._tries = 0

    def _new_slots(self) -> list[Slot]:
        return [Slot(place) for place in range(len(self._shares))]

    def _lost(self) -> list[Slot]:
        return [slot for slot in self._slots if slot.share is None]

    def _serving(self) -> list[Share]:
        """Return the shares whose workers serve the device, each once."""
        return list(dict.fromkeys(slot.share for slot in self._slots if slot.share is not None))

    def _order(self, place: int) -> tuple[bool, int]:
        return not server(self._shares, place).opened, place

    def _socket_pairs(self, slots: Sequence[Slot]) -> Ends | None:
        """Return new sockets; None: that is tried again later, or was too often."""
        try:
            ends = socket_pairs(self._platform, self._shares, slots)
        except OSError as error:
            log.warning("disk %s: no socket for a device: %s", self._disk, reason(error))
            self._tries_for_sockets += 1
            if self._tries_for_sockets > SOCKET_TRIES:
                self._on_failed(error)
            else:
                self._errand.pause(SHORTAGE_SECONDS)
            return None
        self._tries_for_sockets = 0
        return ends

    def _detach_late(self, device: Device) -> None:
        """Undo an attach that came through after its deadline."""
        log.warning("%s was attached too late and is detached again", device.path)
        free(self._platform, device, lambda: None)

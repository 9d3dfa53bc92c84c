"""One disk as the controller runs it: what is, what should be, and the next step between them.

`step` is level-triggered: called after every event and every second, it looks at the state and
does one thing, or nothing while the answer to the last one is awaited. Rising: open on the worker,
attach the kernel device (or give it a new socket), probe it. Falling, in the one order: stop
intake (the device), drain, release on the worker, discard what is left.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from backends import registry
from reactor.attach.device import Device
from reactor.control.errand import Errand
from reactor.control.link import (
    ANSWER_SECONDS,
    ATTACH_SECONDS,
    DRAIN_SECONDS,
    DeviceLink,
    Geometry,
)
from reactor.control.service import DiskState, DiskStatus, Done
from reactor.control.workers import WorkerProcess
from reactor.errors import DeviceError, ReactorError, reason
from reactor.log import logger
from reactor.loop import Reactor
from reactor.messages import Message
from reactor.spec import DiskSpec

OPEN_SECONDS: Final = 60.0
RESIZE_RETRY_SECONDS: Final = 0.2
REMOVE_SECONDS: Final = 15.0

Desired: TypeAlias = Literal["online", "stopped", "gone"]

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """What all disks of a service share."""

    reactor: Reactor
    instance: str
    on_settled: Callable[[DiskControl], None]  # a disk is what it should be, or failed
    may_attach: Callable[[DiskControl], bool]  # no other disk goes first
    is_succeeded: Callable[[DiskControl], bool]  # another disk takes over its storage

    def tag(self, disk: str) -> str:
        """Return the backend identifier under which the kernel holds the disk's device."""
        return f"nbd-reactor:{self.instance}:{disk}"


class DiskControl:
    """A disk and what is done to make it what it should be."""

    def __init__(self, host: Host, spec: DiskSpec, worker: WorkerProcess) -> None:
        self.spec = spec
        self.worker = worker
        self.desired: Desired = "online"
        self.keep_device = False  # stop the disk, but let the kernel hold its device
        self.forced = False  # stop without writing back
        self.failure: Exception | None = None
        self.settled = False
        self.statistics: dict[str, int] = {}
        self.geometry = Geometry()
        self._host = host
        self._opened = False  # the worker has the disk open
        self._hot = False  # removed, not stopped: what is written back would fail anyway
        self._refusing = False  # the worker refuses I/O
        self._again_online = False  # wanted online while it was still being removed
        self._errand = Errand(host.reactor, worker, self.step)
        self._link = DeviceLink(host.reactor, self._errand, worker, self._on_link_failed)
        self._configured = spec
        self._waiting: list[Done] = []
        self._attaching: Callable[[str | Exception], None] | None = None
        self._resize: tuple[int, Done] | None = None

    # --- what front ends ask ---

    def want(self, desired: Desired, done: Done | None = None, *, hot: bool = False) -> None:
        """Change what the disk should be; `done` comes when it is, or has failed."""
        if desired == "online" and self._refusing:
            self._again_online = True  # first it must be let go
            self._again(done)
            return
        if desired == "online":
            self.failure = None
            self._link.forgive()
            self._hot = False
        self._again_online = False
        if self.desired != "gone":
            self.desired = desired
        self._hot = self._hot or hot
        self._again(done)

    def change(self, spec: DiskSpec) -> bool:
        """Become `spec` in place, if only device or size differ; else nothing happens: False."""
        self._configured = spec
        size = spec.options.get("size")
        if replace(spec, device=self.spec.device) == self.spec:
            self.spec = spec
            self.want("online")
            return True
        old = replace(self.spec, device=spec.device)
        if size and self.online and old == _with_size(spec, self.spec.options.get("size")):
            self.spec = old
            if size < self.geometry.size:
                log.warning(
                    "disk %s keeps its %d bytes: a reload does not cut a disk, `resize` does",
                    *(self.spec.name, self.geometry.size),
                )
                self.want("online")
            else:
                self.resize(size, self._report_resize)
            return True
        return False

    def attach(self, device: str | None, done: Callable[[str | Exception], None]) -> None:
        """Attach to `device` (None: the first free)."""
        if not self._rising():
            done(OSError(errno.ENODEV, f"disk {self.spec.name} is {self.state}"))
            return
        if self.spec.device is not None or self.path is not None or self._attaching is not None:
            message = f"disk {self.spec.name} is on {self.path or self.spec.device} already"
            done(OSError(errno.EPERM, message))
            return
        self._attaching = done
        self.spec = self.spec.with_device(device or "auto")
        self._again(None)

    def _report_resize(self, error: Exception | None) -> None:
        if isinstance(error, OSError) and error.errno == errno.EBUSY and self._rising():
            # Another resize is under way; the newest config counts.
            self._host.reactor.call_later(
                RESIZE_RETRY_SECONDS, lambda: self.change(self._configured)
            )
        elif error is not None:
            log.error("disk %s keeps its size: %s", self.spec.name, reason(error))

    def detach(self, done: Done) -> None:
        """Give up the device; the disk stays."""
        self.spec = self.spec.with_device(None)
        self._again(done)

    def resize(self, size: int, done: Done) -> None:
        """Change the size of the disk and of its device."""
        if self._resize is not None or not self.online:
            done(OSError(errno.EBUSY, f"disk {self.spec.name} is {self.state}"))
            return
        self._resize = (size, done)
        self._again(None)

    # --- what it is ---

    @property
    def path(self) -> str | None:
        """The device really attached."""
        return self._link.path

    @property
    def awaits_device(self) -> bool:
        """Whether it is about to attach a device that it names."""
        named = self.spec.device not in (None, "auto")
        return named and self.path is None and self._rising()

    @property
    def leaves_device(self) -> bool:
        """Whether it is about to let go of its device."""
        return not self._rising() or self.spec.device not in ("auto", self.path)

    @property
    def online(self) -> bool:
        """Whether everything that should serve does."""
        return self.state == "online"

    @property
    def state(self) -> DiskState:
        """The word for what the disk is now."""
        if self._rising():
            up = self._opened and (self.spec.device is None or self._link.probed)
            return "online" if up and self._link.serving else "starting"
        if not self.settled:
            return "stopping"
        if self.failure is not None:
            return "removed" if self._hot else "failed"
        return "stopped"

    def status(self) -> DiskStatus:
        """Return what front ends show."""
        return DiskStatus(
            spec=self.spec,
            state=self.state,
            reason=reason(self.failure) if self.failure is not None else "",
            core=self.worker.core,
            size=self.geometry.size,
            block_size=self.geometry.block_size,
            flags=self.geometry.flags,
            device=self.path,
            statistics=dict(self.statistics),
        )

    # --- what happens ---

    def heard(self, message: Message) -> None:
        """Take an answer or event of the worker."""
        kind = message["type"]
        if kind == "removed":
            self._on_removed(message["reason"])
        elif kind == "disconnected":
            self._link.connection_lost(message["generation"])
        else:
            self._on_command_failed(self._errand.answered(message), message)
        self.step()

    def _on_command_failed(self, command: str | None, message: Message) -> None:
        if command in ("stop", "release"):
            # Whatever it still does to the disk must end before the disk can be let go.
            self.worker.kill(f"it cannot {command} disk {self.spec.name}: {message['reason']}")
        elif command is not None:
            self._on_failed(OSError(message["errno"], message["reason"]))

    def worker_lost(self) -> None:
        """Note that the worker is gone, with its channel and its ends of the sockets."""
        self._opened = self._refusing = False
        self._link.worker_lost(self.spec)
        self._errand.worker_lost()
        self.step()

    def adopt(self, device: Device) -> None:
        """Take over a device that the kernel still holds for this disk."""
        log.info("disk %s: the kernel still holds %s", self.spec.name, device.path)
        self._link.adopt(device, self.spec)

    def step(self) -> None:
        """Do the next thing, if nothing is awaited."""
        if self._errand.busy():
            if not self._rising() and self._errand.needs_worker() and self.worker.is_silent:
                self.worker.kill(f"disk {self.spec.name} must stop and it does not answer")
            return
        if self._rising():
            self._rise()
        else:
            self._fall()
        if self._errand.busy():
            self.settled = False

    # --- rising ---

    def _rising(self) -> bool:
        return self.desired == "online" and self.failure is None

    def _rise(self) -> None:
        wanted, link = self.spec.device, self._link
        device = link.device
        if device is not None and wanted in ("auto", device.path):
            link.stay()
        if not self._opened:
            self._open()
        elif device is None and wanted is not None:
            if self._host.may_attach(self):
                link.attach(self.spec, self._host.tag(self.spec.name), self.geometry)
        elif device is not None and wanted not in ("auto", device.path):
            self._let_go(device)
        elif device is not None and not link.linked:
            link.reconnect(device)
        elif device is not None and not link.fitted:
            link.fit(device, self.geometry)
        elif device is not None and not link.probed:
            link.probe(device)
        elif self._resize is not None:
            self._resize_step(*self._resize)
        else:
            self._settle()

    def _open(self) -> None:
        if self.worker.state == "failed":
            self._on_failed(ReactorError(f"the worker of core {self.worker.core} keeps dying"))
        elif self.worker.state == "running":
            self._ask("start", "started", OPEN_SECONDS, self._on_started, spec=self._spec_message())

    def _spec_message(self) -> dict[str, Any]:
        # What the worker needs not know changes without it: an open disk stays the same disk.
        return self.spec.with_device(None).to_message()

    def _on_started(self, message: Message) -> None:
        self._opened = True
        self.geometry = Geometry(message["size"], message["block_size"], message["flags"])

    def _resize_step(self, size: int, done: Done) -> None:
        device, geometry = self._link.device, self.geometry

        def finish(error: Exception | None) -> None:
            self._resize = None
            done(error)

        def resize_device(then: Callable[[], None]) -> None:
            if device is None:
                then()
                return
            self._errand.call(
                f"resizing {device.path}",
                ATTACH_SECONDS,
                lambda: device.resize(size, geometry.block_size),
                lambda _, error: finish(error) if error is not None else then(),
            )

        def resize_disk(then: Callable[[], None]) -> None:
            def resized(message: Message) -> None:
                self.geometry = replace(geometry, size=message["size"])
                then()

            # First: should the worker die in the middle, the next one opens what is wanted.
            self._note_size(size)
            self._ask("resize", "resized", OPEN_SECONDS, resized, disk=self.spec.name, size=size)

        # The kernel must never believe in blocks that the disk does not have.
        if size >= geometry.size:
            resize_disk(lambda: resize_device(lambda: finish(None)))
        else:
            resize_device(lambda: resize_disk(lambda: finish(None)))

    def _note_size(self, size: int) -> None:
        if "size" in self.spec.options:
            self.spec = _with_size(self.spec, size)

    # --- falling ---

    def _fall(self) -> None:
        device = self._link.device
        keep = self.keep_device and device is not None and device.can_reconnect
        if self._hot and self._opened and not self._refusing and self.worker.healthy:
            self._ask("remove", "removed", REMOVE_SECONDS, lambda _: None, disk=self.spec.name)
        elif device is not None and not keep:
            self._let_go(device)
        elif self._opened:
            self._ask(
                "stop",
                "stopped",
                DRAIN_SECONDS + ANSWER_SECONDS,
                self._on_stopped,
                disk=self.spec.name,
                seconds=DRAIN_SECONDS,
            )
        else:
            keep_memory = self.keep_device or self._host.is_succeeded(self)
            if self.desired == "gone" and not keep_memory:
                self.discard()
            self._settle()

    def _writes_back(self) -> bool:
        # What is written back to a disk that was removed or failed would only fail again.
        return not self._hot and self.failure is None and not self.forced

    def _let_go(self, device: Device) -> None:
        """Do the next thing on the way to no device, with its cache written if that can be."""
        link = self._link
        unwritten = not link.linked and not link.flushed and self._writes_back()
        if not unwritten or not device.can_reconnect or self.worker.state == "failed":
            link.release(device, write_back=self._writes_back())
        elif self._opened:
            link.reconnect(device)
        else:
            self._open()

    def _on_stopped(self, _message: Message) -> None:
        self._opened = self._refusing = False
        self.statistics = {}

    def discard(self) -> None:
        """Remove what the disk keeps outside its worker."""
        try:
            registry.backend(self.spec.backend).discard(self.spec.name, self._host.instance)
        except (OSError, ReactorError) as error:
            log.error("disk %s: what it kept is not removed: %s", self.spec.name, reason(error))

    # --- waiting and answering ---

    def _on_failed(self, error: Exception) -> None:
        if (
            self._resize is not None
            and self._opened
            and self.failure is None
            and self._link.serving
        ):
            _, done = self._resize
            self._resize = None
            self._note_size(self.geometry.size)
            self._link.fitted = False  # should the kernel have the new size already
            done(error)
            return
        if self.failure is None:
            log.error("disk %s failed: %s", self.spec.name, reason(error))
            self.failure = error

    def _on_link_failed(self, error: Exception) -> None:
        """Fail the disk; but a device that was asked for at run time fails alone."""
        if self._attaching is None:
            self._on_failed(error)
            return
        attaching, self._attaching = self._attaching, None
        self.spec = self.spec.with_device(None)
        attaching(error)

    def _on_removed(self, why: str) -> None:
        self._refusing = True
        self._hot = True
        if self._errand.awaits("removed"):
            self._errand.end_command()
        elif self.failure is None and self.desired == "online":
            self.failure = ReactorError(f"its storage was removed: {why}")

    def _settle(self) -> None:
        if self._again_online:
            self._again_online = False
            self.want("online")
            return
        if self.settled:
            return
        self.settled = True
        error = self.failure if self.desired == "online" else None
        if self._attaching is not None:
            attaching, self._attaching = self._attaching, None
            attaching(error or self.path or OSError(errno.ENODEV, "the disk is stopped"))
        if self._resize is not None and not self._rising():
            _, resized = self._resize
            self._resize = None
            resized(error or OSError(errno.ENODEV, "the disk is stopped"))
        waiting, self._waiting = self._waiting, []
        self._host.on_settled(self)
        # Last: whoever hears of it may want something else at once.
        for done in waiting:
            done(error)

    def _again(self, done: Done | None) -> None:
        self.settled = False
        if done is not None:
            self._waiting.append(done)
        self.step()

    def _ask(
        self, kind: str, answer: str, within: float, take: Callable[[Message], None], **fields: Any
    ) -> None:
        def unanswered(why: str) -> None:
            if kind in ("stop", "remove"):
                # Whatever it still does to the disk must end before the disk can be let go.
                self.worker.kill(why)
            else:
                self._opened = True  # it may yet do so: have it stopped
                self._on_failed(DeviceError(errno.ETIMEDOUT, why))

        self._errand.ask(kind, answer, within, take, unanswered, **fields)


def _with_size(spec: DiskSpec, size: int | None) -> DiskSpec:
    return replace(spec, options={**spec.options, "size": size})

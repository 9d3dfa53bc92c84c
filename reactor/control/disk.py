"""One disk as the controller runs it: what is, what should be, and the next step between them.

`step` is level-triggered: called after every event and every second, it looks at the state and
does one thing, or nothing while the answer to the last one is awaited. Rising: open on the worker,
attach the kernel device (or give it a new socket), probe it. Falling, in the one order: stop
intake (the device), drain, release on the worker, discard what is left.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from backends import registry
from reactor.attach.device import Device, attach
from reactor.control.blocking import BlockingCall
from reactor.control.service import DiskState, DiskStatus, Done
from reactor.control.workers import WorkerProcess
from reactor.errors import DeviceError, ReactorError, reason
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.messages import Message
from reactor.spec import DiskSpec

OPEN_SECONDS: Final = 60.0
ATTACH_SECONDS: Final = 30.0
PROBE_SECONDS: Final = 30.0
FLUSH_SECONDS: Final = 60.0
DETACH_SECONDS: Final = 30.0
DRAIN_SECONDS: Final = 10.0
ANSWER_SECONDS: Final = 5.0  # what an answer may take beyond the work itself
REMOVE_SECONDS: Final = 15.0
RECONNECT_RETRY_SECONDS: Final = 0.05
RECONNECT_TRIES_MAX: Final = 200
SOCKET_BUFFER: Final = 4 << 20  # bytes each way between kernel and worker; the host may cap it

Desired: TypeAlias = Literal["online", "stopped", "gone"]

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Host:
    """What all disks of a service share."""

    reactor: Reactor
    instance: str
    on_settled: Callable[[DiskControl], None]  # a disk is what it should be, or failed

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
        self.failure: Exception | None = None
        self.settled = False
        self.statistics: dict[str, int] = {}
        self.device: Device | None = None
        self.size = self.block_size = self.flags = 0
        self._host = host
        self._next_spec: DiskSpec | None = None  # stop only to come up again as this
        self._opened = False  # the worker has the disk open
        self._linked = False  # the worker serves the device
        self._probed = False
        self._flushed = False
        self._hot = False  # removed, not stopped: what is written back would fail anyway
        self._refusing = False  # the worker refuses I/O
        self._command = 0  # the id of the command whose answer is awaited
        self._last_command = 0
        self._answer: tuple[str, Callable[[Message], None]] | None = None
        self._deadline: Timer | None = None
        self._call: BlockingCall[Any] | None = None
        self._call_needs_worker = False
        self._retry: Timer | None = None
        self._reconnect_tries = 0
        self._generation = 0
        self._waiting: list[Done] = []
        self._attaching: Callable[[str | Exception], None] | None = None
        self._resize: tuple[int, Done] | None = None

    # --- what front ends ask ---

    def want(self, desired: Desired, done: Done | None = None, *, hot: bool = False) -> None:
        """Change what the disk should be; `done` comes when it is, or has failed."""
        if desired == "online":
            self.failure = None
            self._reconnect_tries = 0
            self._hot = False
        if self.desired != "gone":
            self.desired = desired
        self._hot = self._hot or hot
        self._again(done)

    def change(self, spec: DiskSpec) -> None:
        """Become `spec`: in place where only device or size differ, else by a restart."""
        size = spec.options.get("size")
        if replace(spec, device=self.spec.device) == self.spec:
            self.spec = spec
        elif size and self.online and self.spec == _with_size(spec, self.spec.options.get("size")):
            self.resize(size, self._report_resize)
        else:
            self._next_spec = spec
        self.want("online")

    def attach(self, device: str | None, done: Callable[[str | Exception], None]) -> None:
        """Attach to `device` (None: the first free)."""
        if self.spec.device is not None or self.device is not None or self._attaching is not None:
            message = f"disk {self.spec.name} is on {self.path or self.spec.device} already"
            done(OSError(errno.EPERM, message))
            return
        self._attaching = done
        self.spec = self.spec.with_device(device or "auto")
        self._again(None)

    def _report_resize(self, error: Exception | None) -> None:
        if error is not None:
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
        return self.device.path if self.device is not None else None

    @property
    def online(self) -> bool:
        """Whether everything that should serve does."""
        return self.state == "online"

    @property
    def state(self) -> DiskState:
        """The word for what the disk is now."""
        if self._rising():
            up = self._opened and (self.spec.device is None or self._probed)
            return "online" if up and (self.device is None or self._linked) else "starting"
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
            size=self.size,
            block_size=self.block_size,
            flags=self.flags,
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
            if message["generation"] == self._generation and self._linked:
                self._linked = False
                log.warning("disk %s: device %s lost its connection", self.spec.name, self.path)
        elif kind == "failed" and message["id"] == self._command != 0:
            self._end_command()
            self._on_failed(OSError(message["errno"], message["reason"]))
        elif self._answer and kind == self._answer[0] and message["id"] == self._command:
            take = self._answer[1]
            self._end_command()
            take(message)
        self.step()

    def worker_lost(self) -> None:
        """Note that the worker is gone, with its channel and its ends of the sockets."""
        self._opened = self._linked = self._refusing = False
        self._end_command()
        if self._call is not None and self._call_needs_worker:
            # It waits for I/O that only the next worker can answer, which waits for this call.
            self._call.abandon()
            self._call = None
        self.step()

    def adopt(self, device: Device) -> None:
        """Take over a device that the kernel still holds for this disk."""
        log.info("disk %s: the kernel still holds %s", self.spec.name, device.path)
        self.device = device
        self._probed = True  # it carried I/O before

    def step(self) -> None:
        """Do the next thing, if nothing is awaited."""
        if self._command or self._call is not None or self._retry is not None:
            return
        if self._rising():
            self._rise()
        else:
            self._fall()

    # --- rising ---

    def _rising(self) -> bool:
        return self.desired == "online" and self.failure is None and self._next_spec is None

    def _rise(self) -> None:
        wanted = self.spec.device
        if not self._opened:
            self._open()
        elif self.device is None and wanted is not None:
            self._attach(wanted)
        elif self.device is not None and wanted not in ("auto", self.device.path):
            self._release_device()
        elif self.device is not None and not self._linked:
            self._reconnect(self.device)
        elif self.device is not None and not self._probed:
            self._probe(self.device)
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
        self.size = message["size"]
        self.block_size = message["block_size"]
        self.flags = message["flags"]

    def _attach(self, wanted: str) -> None:
        spec, tag = self.spec, self._host.tag(self.spec.name)
        kernel_ends, worker_ends = _socket_pairs(spec.connections)
        size, block_size, flags = self.size, self.block_size, self.flags

        def attach_it() -> Device:
            return attach(
                wanted,
                spec.attach,
                tag=tag,
                size=size,
                block_size=block_size,
                flags=flags,
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
            self._probed = self._flushed = False
            self._reconnect_tries = 0
            self._hand_over(worker_ends)

        name = f"attaching {spec.device} to disk {spec.name}"
        self._run(name, ATTACH_SECONDS, attach_it, attached, late=self._detach_late)

    def _detach_late(self, device: Device) -> None:
        """Undo an attach that came through after its deadline."""
        log.warning("%s was attached too late and is detached again", device.path)

        def detached(_: None, error: Exception | None) -> None:
            if error is not None:
                log.error("disk %s: %s", self.spec.name, reason(error))

        name = f"detaching {device.path}"
        BlockingCall(self._host.reactor, name, DETACH_SECONDS, device.detach, detached)

    def _reconnect(self, device: Device) -> None:
        if not device.can_reconnect:
            # By ioctl the kernel's thread is gone with its socket: only a new attach helps.
            self._detach(device)
            return
        kernel_ends, worker_ends = _socket_pairs(self.spec.connections)

        def reconnected(_: None, error: Exception | None) -> None:
            if error is None:
                log.info("disk %s: device %s has a new socket", self.spec.name, device.path)
                self._hand_over(worker_ends)
                return
            _close_all(worker_ends)
            self._reconnect_tries += 1
            again = isinstance(error, DeviceError) and error.errno == errno.EAGAIN
            if again and self._reconnect_tries < RECONNECT_TRIES_MAX:
                self._retry = self._host.reactor.call_later(RECONNECT_RETRY_SECONDS, self._go_on)
            else:
                self._on_failed(error)

        name = f"reconnecting {device.path}"
        self._run(
            name, ATTACH_SECONDS, lambda: device.reconnect(kernel_ends, worker_ends), reconnected
        )

    def _hand_over(self, worker_ends: Sequence[socket.socket]) -> None:
        """Give the worker its ends and keep none, so that its death is seen by the kernel."""
        self._generation += 1
        try:
            self.worker.hand_over(
                "connection",
                [end.fileno() for end in worker_ends],
                disk=self.spec.name,
                generation=self._generation,
            )
        except OSError as error:
            # The worker died or is full; the kernel sees its link dead, and the next step retries.
            log.warning("disk %s: handing over a socket: %s", self.spec.name, reason(error))
            self._retry = self._host.reactor.call_later(RECONNECT_RETRY_SECONDS, self._go_on)
        else:
            self._linked = self._opened
        finally:
            _close_all(worker_ends)

    def _probe(self, device: Device) -> None:
        def probed(_: None, error: Exception | None) -> None:
            self._reconnect_tries = 0
            if error is not None:
                self._on_failed(error)
            else:
                self._probed = True

        name = f"reading {device.path}"
        self._run(name, PROBE_SECONDS, device.probe, probed, needs_worker=True)

    def _resize_step(self, size: int, done: Done) -> None:
        device = self.device

        def finish(error: Exception | None) -> None:
            self._resize = None
            done(error)

        def resize_device(then: Callable[[], None]) -> None:
            if device is None:
                then()
                return
            self._run(
                f"resizing {device.path}",
                ATTACH_SECONDS,
                lambda: device.resize(size, self.block_size),
                lambda _, error: finish(error) if error is not None else then(),
            )

        def resize_disk(then: Callable[[], None]) -> None:
            def resized(message: Message) -> None:
                self.size = message["size"]
                if "size" in self.spec.options:
                    self.spec = _with_size(self.spec, self.size)
                then()

            self._ask("resize", "resized", OPEN_SECONDS, resized, disk=self.spec.name, size=size)

        # The kernel must never believe in blocks that the disk does not have.
        if size >= self.size:
            resize_disk(lambda: resize_device(lambda: finish(None)))
        else:
            resize_device(lambda: resize_disk(lambda: finish(None)))

    # --- falling ---

    def _fall(self) -> None:
        keep = self.keep_device and self.device is not None and self.device.can_reconnect
        if self._hot and self._opened and not self._refusing and self.worker.healthy:
            self._ask("remove", "removed", REMOVE_SECONDS, lambda _: None, disk=self.spec.name)
        elif self.device is not None and not keep:
            self._release_device()
        elif self._opened:
            self._ask(
                "stop",
                "stopped",
                DRAIN_SECONDS + ANSWER_SECONDS,
                self._on_stopped,
                disk=self.spec.name,
                seconds=DRAIN_SECONDS,
            )
        elif self._next_spec is not None and self.desired == "online":
            self._become(self._next_spec)
        else:
            if self.desired == "gone" and not self.keep_device:
                self._discard(self.spec)
            self._settle()

    def _release_device(self) -> None:
        assert self.device is not None
        if self.worker.pid is not None and not self.worker.healthy and self._linked:
            # DISCONNECT to a device whose worker does not read blocks in the kernel, for ever,
            # and holds the lock of all generic netlink: end the worker first.
            self.worker.kill(f"{self.device.path} must be detached and it does not answer")
        elif self._linked and not self._flushed and not self._hot and self.failure is None:
            self._flush(self.device)
        else:
            self._detach(self.device)

    def _flush(self, device: Device) -> None:
        def flushed(_: None, error: Exception | None) -> None:
            self._flushed = True
            if error is not None:
                log.error("disk %s: %s", self.spec.name, reason(error))

        name = f"writing back {device.path}"
        self._run(name, FLUSH_SECONDS, device.flush, flushed, needs_worker=True)

    def _detach(self, device: Device) -> None:
        def detached(_: None, error: Exception | None) -> None:
            self.device = None
            self._probed = self._flushed = False
            if error is not None:
                log.error("disk %s: %s", self.spec.name, reason(error))

        self._linked = False  # the connection's end is expected
        self._run(f"detaching {device.path}", DETACH_SECONDS, device.detach, detached)

    def _on_stopped(self, _message: Message) -> None:
        self._opened = self._refusing = False
        self.statistics = {}

    def _become(self, spec: DiskSpec) -> None:
        old, self.spec, self._next_spec = self.spec, spec, None
        if (old.backend, old.options) != (spec.backend, spec.options):
            self._discard(old)
        self.step()

    def _discard(self, spec: DiskSpec) -> None:
        try:
            registry.backend(spec.backend).discard(spec.name, self._host.instance)
        except (OSError, ReactorError) as error:
            log.error("disk %s: what it kept is not removed: %s", spec.name, reason(error))

    # --- waiting and answering ---

    def _on_failed(self, error: Exception) -> None:
        if self._resize is not None and self._opened and self.failure is None and self._linked_up():
            _, done = self._resize
            self._resize = None
            done(error)
            return
        if self._attaching is not None and self.device is None and self._opened:
            attaching, self._attaching = self._attaching, None
            self.spec = self.spec.with_device(None)
            attaching(error)
            return
        if self.failure is None:
            log.error("disk %s failed: %s", self.spec.name, reason(error))
            self.failure = error

    def _linked_up(self) -> bool:
        return self.device is None or self._linked

    def _on_removed(self, why: str) -> None:
        self._refusing = True
        self._hot = True
        if self._answer is not None and self._answer[0] == "removed":
            self._end_command()
        elif self.failure is None and self.desired == "online":
            self.failure = ReactorError(f"its storage was removed: {why}")

    def _settle(self) -> None:
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
        for done in waiting:
            done(error)
        self._host.on_settled(self)

    def _again(self, done: Done | None) -> None:
        self.settled = False
        if done is not None:
            self._waiting.append(done)
        self.step()

    def _go_on(self) -> None:
        self._retry = None
        self.step()

    def _ask(
        self, kind: str, answer: str, within: float, take: Callable[[Message], None], **fields: Any
    ) -> None:
        self._last_command += 1
        if not self.worker.send(kind, id=self._last_command, **fields):
            if self.worker.pid is None:
                self._opened = self._linked = False
            return  # the next step tries again
        self.settled = False
        self._command = self._last_command
        self._answer = (answer, take)
        self._deadline = self._host.reactor.call_later(within, lambda: self._unanswered(kind))

    def _end_command(self) -> None:
        self._command = 0
        self._answer = None
        if self._deadline is not None:
            self._deadline.cancel()

    def _unanswered(self, kind: str) -> None:
        self._end_command()
        message = f"worker core {self.worker.core} did not answer {kind}"
        if kind in ("stop", "remove"):
            # Whatever it still does to the disk must end before the disk can be let go.
            self.worker.kill(message)
        else:
            self._opened = True  # it may yet do so: have it stopped
            self._on_failed(DeviceError(errno.ETIMEDOUT, message))
        self.step()

    def _run(
        self,
        name: str,
        seconds: float,
        function: Callable[[], Any],
        done: Callable[[Any, Exception | None], None],
        *,
        late: Callable[[Any], None] | None = None,
        needs_worker: bool = False,
    ) -> None:
        def finished(result: Any, error: Exception | None) -> None:
            self._call = None
            done(result, error)
            self.step()

        self.settled = False
        self._call_needs_worker = needs_worker
        self._call = BlockingCall(self._host.reactor, name, seconds, function, finished, late)


def _with_size(spec: DiskSpec, size: int | None) -> DiskSpec:
    return replace(spec, options={**spec.options, "size": size})


def _socket_pairs(count: int) -> tuple[list[socket.socket], list[socket.socket]]:
    pairs = [socket.socketpair() for _ in range(count)]
    for end in (end for pair in pairs for end in pair):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER)
    return [kernel for kernel, _ in pairs], [worker for _, worker in pairs]


def _close_all(ends: Sequence[socket.socket]) -> None:
    for end in ends:
        end.close()

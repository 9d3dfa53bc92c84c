"""A worker: pinned to one core, it serves the disks that the controller gives it."""

from __future__ import annotations

import errno
import os
import select
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from logging import INFO, WARNING
from pathlib import Path
from typing import Final

from backends import registry
from reactor import pressure
from reactor.bus import RECEIVE_BYTES, WorkerBus, descriptor_socket
from reactor.data.awaiting import await_storage
from reactor.data.clientmemory import ClientMemory
from reactor.data.reception import Reception, close_all
from reactor.data.serving import ServedDisk
from reactor.errors import BusError, ReactorError, error_number, reason
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.messages import HANDOVERS, Message, decode
from reactor.spec import DiskSpec

HEARTBEAT_SECONDS: Final = 1.0
IDLE_HEARTBEAT_SECONDS: Final = 2.0  # the controller waits for five
HANDOVERS_PER_TURN: Final = 16
HANDOVERS_MAX: Final = 1024  # that are taken before a disk listens
# A worker that was killed leaves I/O behind, which holds its files and devices a while longer: the
# kernel lets go of an io_uring when its last operation ends, not when its process does. And what
# the host lacks now there may be soon.
RETRIED: Final = (errno.EBUSY, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
START_RETRY_SECONDS: Final = 0.1
START_TRIES: Final = 50
FAILURES_MAX: Final = 64  # that are remembered
DRAIN_SECONDS: Final = 10.0
AGAIN_SECONDS: Final = 0.05  # until what is not so yet is looked at again

log = logger(__name__)


class Worker:
    """The disks of one core and the bus to the controller."""

    def __init__(
        self,
        reactor: Reactor,
        core: int,
        runtime_dir: Path,
        instance: str,
        controller: int,  # a descriptor of its process
    ) -> None:
        self._reactor = reactor
        self._core = core
        self._instance = instance
        self._runtime_dir = runtime_dir
        self._memory = ClientMemory(reactor)
        self._disks: dict[str, ServedDisk] = {}
        # Disks that wait for their storage: the command and what will go on with it.
        self._retries: dict[str, tuple[int, Timer]] = {}
        self._failures: dict[str, tuple[int, Exception]] = {}  # by disk: of the last `start`
        self._reception = Reception(reactor, runtime_dir, self._on_unheard)
        self._welcomed = False
        self._resting = True  # nothing has happened since the last heartbeat
        self._inquiry = 0  # that is not answered yet
        self._controller = controller
        self._descriptors = _bind_descriptor_socket(descriptor_socket(runtime_dir, core))
        reactor.add_fd(self._descriptors.fileno(), self._take_descriptors, name="descriptors")
        identity = f"worker-{core}-{os.getpid()}".encode()
        self._bus = WorkerBus(reactor, runtime_dir / "bus.sock", identity, self._on_command)
        self._heartbeat()

    def close(self) -> None:
        """Release the sockets; the disks are stopped already."""
        self._bus.close()
        self._reactor.remove_fd(self._descriptors.fileno())
        self._descriptors.close()
        self._reception.close()

    def end_if_orphaned(self) -> None:
        """Finish what is in flight, let go of everything and exit: SIGTERM without a controller.

        systemd signals the whole control group: while the controller lives, stopping is its affair.
        """
        if select.select([self._controller], [], [], 0)[0]:
            self._forget_retries()
            for name in list(self._disks):
                self._stop({"id": 0, "disk": name, "seconds": DRAIN_SECONDS})
            self._end_when_stopped()

    def _end_when_stopped(self) -> None:
        if self._disks:
            self._reactor.call_later(AGAIN_SECONDS, self._end_when_stopped)
        else:
            self._reactor.stop()

    # --- what the controller says ---

    def _on_command(self, message: Message) -> None:
        handler = {
            "inquire": self._be_asked,
            "welcome": self._welcome,
            "start": self._start,
            "stop": self._stop,
            "release": self._release,
            "remove": self._remove,
            "resize": self._resize,
            "shutdown": self._shut_down,
        }[message["type"]]
        self._run(handler, message)

    def _run(self, handler: Callable[[Message], None], message: Message) -> None:
        try:
            self._try(handler, message)
        except MemoryError:
            # A command without an answer holds up its disk for a minute; the next worker is soon.
            self._reactor.lose()

    def _try(self, handler: Callable[[Message], None], message: Message) -> None:
        try:
            handler(message)
        except (OSError, ReactorError, MemoryError) as error:
            self._failed(message, error)
        except Exception as error:
            # A backend of another package, or a bug of ours: the command fails, the worker lives.
            log.exception("command %s failed", message["type"])
            self._failed(message, error)

    def _failed(self, message: Message, error: Exception) -> None:
        if message["type"] == "start":
            self._failures[_disk_name(message)] = message["id"], error
            if len(self._failures) > FAILURES_MAX:
                del self._failures[next(iter(self._failures))]
        self._bus.send(
            "failed",
            id=message.get("id", 0),
            disk=_disk_name(message),
            errno=error_number(error),
            reason=reason(error),
        )

    def _be_asked(self, message: Message) -> None:
        self._meet(message["controller"])
        self._forget_retries()  # of an earlier controller, perhaps
        self._inquiry = message["id"]
        self._answer(message["id"])

    def _answer(self, inquiry: int) -> None:
        """Say hello once nothing is half done."""
        if inquiry != self._inquiry:
            return  # a later one came
        if all(served.quiet for served in self._disks.values()):
            self._take_waiting(HANDOVERS_MAX)  # a connection may have been sent before
            self._say_hello(inquiry)
            self._inquiry = 0
        else:
            self._reactor.call_later(AGAIN_SECONDS, lambda: self._answer(inquiry))

    def _welcome(self, message: Message) -> None:
        self._meet(message["controller"])
        self._welcomed = True

    def _meet(self, controller: int) -> None:
        """Note who the controller is."""
        with suppress(ProcessLookupError):
            process = os.pidfd_open(controller)
            os.close(self._controller)
            self._controller = process

    def _start(self, message: Message) -> None:
        spec = DiskSpec.from_message(message["spec"])
        command, _ = self._retries.get(spec.name, (0, None))
        if command == message["id"]:  # it was only said again
            return
        command, error = self._failures.pop(spec.name, (0, None))
        if command == message["id"] and error is not None:  # it has failed, and that stands
            raise error
        begin = partial(self._try_to_start, START_TRIES)
        self._forget_retry(spec.name)
        if spec.name in self._disks:
            begin(message)
            return
        waiting = await_storage(self._reactor, spec, lambda: self._run(begin, message))
        self._retries[spec.name] = message["id"], waiting

    def _try_to_start(self, tries: int, message: Message) -> None:
        spec = DiskSpec.from_message(message["spec"])
        self._forget_retry(spec.name)
        self._take_waiting(HANDOVERS_MAX)  # the controller sent systemd's sockets before
        served = self._disks.get(spec.name)
        if served is None:
            try:
                served = self._open(spec, shared=message["shared"], least=message["least"])
            except OSError as error:
                if error.errno not in RETRIED or not tries:
                    raise
                if tries == START_TRIES:
                    log.info("disk %s waits: %s", spec.name, reason(error))
                again = partial(self._try_to_start, tries - 1)
                timer = self._reactor.call_later(
                    START_RETRY_SECONDS, lambda: self._run(again, message)
                )
                self._retries[spec.name] = message["id"], timer
                return
            try:
                # What was open before is served where it can be.
                self._reception.listen(served, must=not message["least"])
            except BaseException:
                self._reception.unlisten(served)
                served.stop(0, lambda: None)
                if served.disk.made:
                    registry.backend(spec.backend).discard(spec.name, self._instance)
                raise
            self._disks[spec.name] = served
        elif replace(served.spec, listen=spec.listen).with_size(0) != spec.with_size(0) or (
            message["shared"] and not served.shared
        ):
            raise OSError(errno.EBUSY, f"disk {spec.name} is served with another config")
        elif served.spec.listen != spec.listen:  # another worker led, or does from now on
            self._reception.listen_instead(served, spec)
        served.leads, served.members = message["leads"], message["members"]
        if served.leads:
            self._reception.spread(served)
        else:
            self._reception.unlisten(served)
        export = served.export
        self._bus.send(
            "started",
            id=message["id"],
            disk=spec.name,
            size=export.size,
            block_size=export.block_size,
            flags=export.flags,
        )

    def _open(self, spec: DiskSpec, *, shared: bool, least: int) -> ServedDisk:
        return ServedDisk(
            self._reactor,
            spec,
            self._instance,
            shared=shared,
            least=least,
            on_removed=self._on_removed,
            on_disconnected=self._on_disconnected,
            memory=self._memory,
        )

    def _forget_retries(self) -> None:
        for name in list(self._retries):
            self._forget_retry(name)

    def _forget_retry(self, name: str) -> None:
        if name in self._retries:
            self._retries.pop(name)[1].cancel()

    def _stop(self, message: Message) -> None:
        name = message["disk"]
        self._forget_retry(name)
        served = self._disks.get(name)

        def stopped() -> None:
            self._disks.pop(name, None)
            self._bus.send("stopped", id=message["id"], disk=name)

        if served is None:
            stopped()
            return
        self._reception.unlisten(served)
        served.stop(message["seconds"], stopped)

    def _release(self, message: Message) -> None:
        def released() -> None:
            self._bus.send("released", id=message["id"], disk=message["disk"])

        self._take_waiting(HANDOVERS_MAX)  # a connection may have been sent before
        served = self._disks.get(message["disk"])
        if served is None:
            released()
        else:
            served.release(message["seconds"], released)

    def _remove(self, message: Message) -> None:
        served = self._disks.get(message["disk"])
        if served is None:
            self._bus.send("removed", id=0, disk=message["disk"], reason="it is not served")
            return
        self._reception.unlisten(served)
        served.remove("hot remove was asked for")

    def _resize(self, message: Message) -> None:
        served = self._served(message)
        served.resize(message["size"], follow=message["follow"])
        self._bus.send("resized", id=message["id"], disk=message["disk"], size=served.export.size)

    def _shut_down(self, _message: Message) -> None:
        self._reactor.stop()

    def _served(self, message: Message) -> ServedDisk:
        served = self._disks.get(message["disk"])
        if served is None:
            raise OSError(errno.ENODEV, f"this worker has no disk {message['disk']}")
        return served

    # --- what it says ---

    def _heartbeat(self) -> None:
        """Tell what has changed, and so that this worker lives."""
        # First: what now fails for want of memory must come again, or it were taken for dead.
        again = self._beat_in(HEARTBEAT_SECONDS)
        try:
            self._tell_changes(again)
        except MemoryError:
            log.warning("no memory to tell what has changed")

    def _tell_changes(self, again: Timer) -> None:
        changed = {
            name: counters
            for name, served in self._disks.items()
            if (counters := served.changed_statistics()) is not None
        }
        if not self._welcomed:
            if not self._say_hello(0):  # the bus is not connected yet
                self._reactor.call_later(AGAIN_SECONDS, self._heartbeat)
                again.cancel()
            return
        if not changed:
            self._beat_in(IDLE_HEARTBEAT_SECONDS)
            again.cancel()
            if not self._resting:  # what was in flight, and waited for its readers, is freed now
                pressure.give_back_heap()
        self._resting = not changed
        reactor = self._reactor
        self._bus.send(
            "statistics",
            reactor={
                "busy_ns": reactor.busy_ns,
                "idle_ns": reactor.idle_ns,
                "turns": reactor.turns,
            },
            disks=changed,
            events=self._bus.events,
        )

    def _beat_in(self, seconds: float) -> Timer:
        # At a full second, as everything that is done now and then: an idle worker wakes up once.
        wait = seconds - self._reactor.clock() / 1e9 % HEARTBEAT_SECONDS
        return self._reactor.call_later(wait, self._heartbeat)

    def _say_hello(self, inquiry: int) -> bool:
        reports = [served.report() for served in self._disks.values()]
        fields = {"core": self._core, "pid": os.getpid(), "disks": reports}
        sent = self._bus.send("hello", id=inquiry, **fields)
        self._bus.events = 0
        return sent

    def _on_removed(self, served: ServedDisk, why: str) -> None:
        self._reception.unlisten(served)
        self._bus.send("removed", id=0, disk=served.spec.name, reason=why)

    def _on_unheard(self, disk: str, why: str) -> None:
        self._bus.send("unheard", disk=disk, reason=why)

    def _on_disconnected(self, served: ServedDisk, generation: int, why: str) -> None:
        self._bus.send("disconnected", disk=served.spec.name, generation=generation, reason=why)

    # --- descriptors from the controller ---

    def _take_descriptors(self, _events: int) -> bool:
        self._take_waiting(HANDOVERS_PER_TURN)
        return True

    def _take_waiting(self, most: int) -> None:
        for _ in range(most):
            try:
                header, fds, flags, _ = socket.recv_fds(self._descriptors, RECEIVE_BYTES, 16)
            except BlockingIOError:
                return
            except OSError as error:
                log.error("taking descriptors: %s", reason(error))
                return
            except MemoryError:
                self._reactor.lose()
                return
            cut_short = bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))
            self._take_handover(header, fds, cut_short=cut_short)

    def _take_handover(self, header: bytes, fds: list[int], *, cut_short: bool) -> None:
        socks: list[socket.socket] = []
        try:
            self._take_over(header, fds, socks, cut_short=cut_short)
        except MemoryError:
            # A device's connection that nobody reads, and whose end nobody told, hangs for ever.
            self._reactor.lose()
            close_all(socks)

    def _take_over(
        self, header: bytes, fds: list[int], socks: list[socket.socket], *, cut_short: bool
    ) -> None:
        try:
            while fds:
                socks.append(socket.socket(fileno=fds[-1]))
                fds.pop()
            socks.reverse()
            message = decode(header, HANDOVERS)
        except (BusError, OSError) as error:
            log.warning("handover refused: %s", reason(error))
            close_all(socks)
            for fd in fds:
                os.close(fd)
            return
        try:
            if cut_short:  # no descriptors were left for it
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            self._take(message, socks)
        except (OSError, ValueError, MemoryError) as error:
            level = INFO if message["type"] == "client" else WARNING  # who gave it serves it
            log.log(level, "handover refused: %s", reason(error))
            close_all(socks)
            if message["type"] == "connection":
                fields = {name: message[name] for name in ("disk", "generation")}
                self._bus.send("disconnected", reason=reason(error), **fields)

    def _take(self, message: Message, socks: list[socket.socket]) -> None:
        if message["type"] == "listener":
            self._reception.hand_over(message["name"], socks)
            return
        served = self._served(message)
        for sock in socks:
            sock.setblocking(False)
        if message["type"] == "client":
            client, leash = socks
            served.serve(client, 0, message["trailing"], leash)
            return
        for sock in socks:
            served.serve(sock, message["generation"], position=message["position"])


def _disk_name(message: Message) -> str:
    spec = message.get("spec")
    name = spec.get("name") if isinstance(spec, dict) else message.get("disk")
    return name if isinstance(name, str) else ""


def _bind_descriptor_socket(path: Path) -> socket.socket:
    # The path may be left from a worker that was killed; the core's lock is ours, so it is stale.
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o177)
    try:
        sock.bind(os.fspath(path))
    finally:
        os.umask(mask)
    return sock

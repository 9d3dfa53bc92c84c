"""A worker: the contract of `reactor.messages`, as `reactor.data.worker` fulfils it."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from reactor.errors import reason
from reactor.messages import SHORTAGE, Message
from reactor.protocol.wire import (
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_FLUSH,
)
from reactor.spec import DiskSpec
from tests.simulation.connection import Connection
from tests.simulation.storage import BLOCK_SIZE, Storage
from tests.simulation.streams import End
from tests.simulation.world import Event

if TYPE_CHECKING:
    from tests.simulation.processes import WorkerProcess

START_RETRY_SECONDS: Final = 0.1
START_TRIES: Final = 50
RETRIED: Final = (errno.EBUSY, errno.ENOMEM)
FLAGS: Final = NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_CAN_MULTI_CONN


class ServedDisk:
    """One open disk."""

    def __init__(self, worker: Worker, spec: DiskSpec, *, shared: bool, least: int) -> None:
        self.worker = worker
        self.spec = spec
        self.shared = shared
        self.leads = False
        self.members: list[int] = []
        self.removal: str | None = None
        self.told_removal = False
        self.connections: list[Connection] = []
        self.all_connections: list[Connection] = []  # also those that ended with work in flight
        self.on_stopped: dict[int, None] | None = None  # the ids of the commands
        self.on_released: dict[int, None] | None = None
        self.storage: Storage = worker.process.host.store.open(
            worker.process, spec, shared=shared, least=least
        )
        self.size = self.storage.size
        self.block_size = spec.block_size or BLOCK_SIZE
        self.flags = FLAGS | (NBD_FLAG_READ_ONLY if spec.readonly else 0)

    @property
    def refusing(self) -> bool:
        """Whether all I/O is refused."""
        return self.removal is not None

    @property
    def ending(self) -> bool:
        """Whether it is being stopped or released."""
        return self.on_stopped is not None or self.on_released is not None

    def report(self) -> dict[str, Any]:
        """Return the REPORT of it."""
        return {
            "spec": self.spec.to_message(),
            "shared": self.shared,
            "leads": self.leads,
            "members": self.members,
            "size": self.size,
            "block_size": self.block_size,
            "flags": self.flags,
            "refusing": self.refusing,
            "reason": self.removal or "",
            "connections": [[c.generation, c.position] for c in self.connections],
        }

    def serve(self, end: End, generation: int, position: int) -> None:
        """Take a connection."""
        connection = Connection(self, end, generation, position)
        self.connections.append(connection)
        self.all_connections.append(connection)
        self.check_size()
        connection.wake()

    def check_device(self, connection: Connection) -> None:
        """What the kernel holds must be what it was attached to, until it is detached."""
        device, world = connection.device, self.worker.process.world
        if device is None or not connection.serves(device):
            return
        device.storage = device.storage or self.storage
        if device.storage is not self.storage:
            world.violate(f"{device.path} passes from {device.storage} to {self.storage}")
        if device.block_size != self.block_size:
            world.violate(f"{device.path} has blocks of {device.block_size}, not {self.block_size}")
        if device.readonly != self.spec.readonly:
            world.violate(f"{device.path} is readonly: {device.readonly}, not {self.spec.readonly}")

    def check_size(self) -> None:
        """The kernel must never believe in blocks that the disk does not have."""
        store = self.worker.process.host.store
        # What was cut, and need not be what it was, may be written back for as far as it goes.
        shorter = self.storage.cut_from and self.storage.key not in store.relied_on
        if shorter or self.spec.name in store.forgotten:
            return
        for connection in self.connections:
            device = connection.device
            if device is not None and connection.serves(device) and device.size > self.size:
                self.worker.process.world.violate(
                    f"{device.path} has {device.size} bytes, {self.worker.process} serves"
                    f" {self.size} of disk {self.spec.name}"
                )

    def connection_closed(self, connection: Connection) -> None:
        """Note the end of a connection."""
        if connection in self.connections:
            self.connections.remove(connection)
            self.worker.say(
                "disconnected",
                disk=self.spec.name,
                generation=connection.generation,
                reason="the kernel closed it",
            )
        self.operation_ended()

    def release(self, command: int, seconds: float) -> None:
        """Drain and close the connections."""
        self.on_released = {**(self.on_released or {}), command: None}
        for connection in list(self.connections):
            connection.drain(seconds)
        self.operation_ended()

    def stop(self, command: int, seconds: float) -> None:
        """Drain, then let go of everything."""
        self.on_stopped = {**(self.on_stopped or {}), command: None}
        for connection in list(self.connections):
            connection.drain(seconds)
        self.operation_ended()

    def remove(self, why: str) -> None:
        """Refuse all I/O, then say so."""
        if self.removal is None:
            self.removal = why
        self.told_removal = False
        self.operation_ended()

    def operation_ended(self) -> None:
        """Go on with what waits for the end of operations."""
        worker, name = self.worker, self.spec.name
        if not all(connection.idle for connection in self.all_connections):
            return
        self.all_connections = list(self.connections)
        if self.removal is not None and not self.told_removal:
            self.told_removal = True
            worker.say("removed", id=0, disk=name, reason=self.removal)
        if self.connections:
            return
        if self.on_released is not None:
            released, self.on_released = self.on_released, None
            for command in released:
                worker.say("released", id=command, disk=name)
        if self.on_stopped is not None:
            stopped, self.on_stopped = self.on_stopped, None
            worker.forget(self)
            for command in stopped:
                worker.say("stopped", id=command, disk=name)
        worker.answer_inquiry()


class Worker:
    """The disks of one process."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.disks: dict[str, ServedDisk] = {}
        self._retries: dict[str, tuple[int, Event]] = {}  # the command, and what goes on with it
        self._welcomed = False
        self._terminating = False
        self._failures: dict[str, tuple[int, OSError]] = {}  # by disk: of the last `start`
        self._refused = 0  # a resize, which is refused again
        self._controller = process.host.controller_pid
        self._inquiry: int | None = None  # its id, while it waits for the disks that end
        self._events = 0
        process.host.open_mailbox(process)
        self._bus = process.host.hub.connect(str(process).encode(), self._on_command)
        self._heartbeat()

    # --- what it hears ---

    def _on_command(self, message: Message) -> None:
        self.process.run(partial(self._command, message))

    def _command(self, message: Message) -> None:
        handler = getattr(self, f"_{message['type']}")
        self._die_perhaps()
        try:
            handler(message)
            self._die_perhaps()
        except OSError as error:
            self._fail(message, error)

    def _fail(self, message: Message, error: OSError) -> None:
        disk = message["spec"]["name"] if "spec" in message else message.get("disk", "")
        if message["type"] == "start":
            self._failures[disk] = message["id"], error
        fields = {"errno": error.errno or errno.EIO, "reason": reason(error)}
        self.say("failed", id=message.get("id", 0), disk=disk, **fields)

    def _die_perhaps(self) -> None:
        if self.process.host.faults.strikes("a worker dies at a step"):
            self.process.send_signal(signal.SIGKILL)

    def _welcome(self, message: Message) -> None:
        self._welcomed = True
        self._controller = message["controller"]

    def _inquire(self, message: Message) -> None:
        self._controller = message["controller"]
        self._welcomed = True
        self._forget_retries()
        self._inquiry = message["id"]
        self.answer_inquiry()

    def answer_inquiry(self) -> None:
        """Say hello when it was asked for and nothing is ending."""
        if self._inquiry is not None and not any(disk.ending for disk in self.disks.values()):
            # First, as a connection that is taken may close at once and ask for the same.
            inquiry, self._inquiry = self._inquiry, None
            self.take_descriptors()
            self._say_hello(inquiry)

    def _start(self, message: Message) -> None:
        name = message["spec"]["name"]
        command, _ = self._retries.get(name, (0, None))
        if command == message["id"]:  # it was only said again
            return
        command, failure = self._failures.pop(name, (0, None))
        if command == message["id"] and failure is not None:
            raise failure
        self._try_to_start(message, START_TRIES)

    def _try_to_start(self, message: Message, tries: int) -> None:
        spec = DiskSpec.from_message(message["spec"])
        self._forget_retry(spec.name)
        disk = self.disks.get(spec.name)
        if disk is None and self.process.host.hangs(spec):
            self._retry(message, tries)
            return
        if disk is None:
            try:
                how = {"shared": message["shared"], "least": message["least"]}
                disk = ServedDisk(self, spec, **how)
            except OSError as error:
                if error.errno not in RETRIED or not tries:
                    raise
                self._retry(message, tries - 1)
                return
            self.disks[spec.name] = disk
            self.process.world.note("%s opens %s", self.process, disk.storage)
        elif replace(disk.spec, listen=spec.listen).with_size(0) != spec.with_size(0) or (
            message["shared"] and not disk.shared
        ):
            raise OSError(errno.EBUSY, f"disk {spec.name} is served with another config")
        disk.spec = replace(disk.spec, listen=spec.listen)
        disk.leads = message["leads"]
        disk.members = message["members"]
        answer = {"size": disk.size, "block_size": disk.block_size, "flags": disk.flags}
        self.say("started", id=message["id"], disk=spec.name, **answer)

    def _forget_retry(self, name: str) -> None:
        _, retry = self._retries.pop(name, (0, None))
        if retry is not None:
            retry.cancel()

    def _forget_retries(self) -> None:
        for name in list(self._retries):
            self._forget_retry(name)

    def _retry(self, message: Message, tries: int) -> None:
        def again() -> None:
            try:
                self._try_to_start(message, tries)
            except OSError as error:
                self._fail(message, error)

        timer = self.process.world.after(START_RETRY_SECONDS, self.process.run, again)
        self._retries[message["spec"]["name"]] = message["id"], timer

    def _stop(self, message: Message) -> None:
        name = message["disk"]
        self._forget_retry(name)
        disk = self.disks.get(name)
        if disk is None:
            self.say("stopped", id=message["id"], disk=name)
        else:
            disk.stop(message["id"], message["seconds"])

    def _release(self, message: Message) -> None:
        self.take_descriptors()
        disk = self.disks.get(message["disk"])
        if disk is None:
            self.say("released", id=message["id"], disk=message["disk"])
        else:
            disk.release(message["id"], message["seconds"])

    def _remove(self, message: Message) -> None:
        disk = self.disks.get(message["disk"])
        if disk is None:
            self.say("removed", id=0, disk=message["disk"], reason="it is not served")
        else:
            disk.remove("hot remove was asked for")

    def _resize(self, message: Message) -> None:
        disk = self.disks.get(message["disk"])
        if disk is None:
            raise OSError(errno.ENODEV, f"this worker has no disk {message['disk']}")
        size = message["size"]
        if not message["follow"] and size != disk.storage.size:
            if message["id"] == self._refused or self.process.host.faults.refuses_resize():
                self._refused = message["id"]
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.process.host.store.check_size(message["disk"], size)
            disk.storage.size, disk.storage.cut_from = size, 0
        disk.size = size
        disk.spec = disk.spec.with_size(size)
        disk.check_size()
        self.say("resized", id=message["id"], disk=message["disk"], size=size)

    def _shutdown(self, _message: Message) -> None:
        self.process.exit(0)

    def terminate(self) -> None:
        """Act on SIGTERM: drain everything and exit, unless a controller lives."""
        if self._controller != self.process.host.controller_pid and not self._terminating:
            self._terminating = True
            self._forget_retries()
            for disk in list(self.disks.values()):
                disk.stop(0, 10.0)
            self._exit_if_terminated()

    def _exit_if_terminated(self) -> None:
        if self._terminating and not self.disks:
            self.process.exit(0)

    # --- what it says ---

    def say(self, kind: str, **fields: Any) -> None:
        """Tell the controller."""
        self._events += 1
        self.process.world.note("%s says %s %s", self.process, kind, fields)
        self._bus.send(kind, **fields)

    def _heartbeat(self) -> None:
        if not self.process.alive:
            return
        world = self.process.world
        world.after(2.0 if self._welcomed else 1.0, self.process.run, self._heartbeat)
        if self._welcomed:
            self._bus.send("statistics", reactor={}, disks={}, events=self._events)
        else:
            self._say_hello(0)

    def _say_hello(self, inquiry: int) -> None:
        disks = [disk.report() for disk in self.disks.values()]
        fields = {"core": self.process.core, "pid": self.process.pid, "disks": disks}
        self._events = 0
        self._bus.send("hello", id=inquiry, **fields)

    # --- connections ---

    def take_descriptors(self) -> None:
        """Take what waits in the mailbox."""
        for end, header in self.process.host.take_mail(self.process):
            faults = self.process.host.faults
            if faults.strikes("no memory to refuse what is handed over", self.process.core):
                self.process.exit(SHORTAGE)
                return
            disk = self.disks.get(header["disk"])
            short = faults.strikes("no memory for what is handed over", self.process.core)
            if short or disk is None or disk.on_stopped is not None:
                end.close()
                lost = {name: header[name] for name in ("disk", "generation")}
                why = os.strerror(errno.ENOMEM) if short else "it is not served"
                self.say("disconnected", reason=why, **lost)
            else:
                disk.serve(end, header["generation"], header["position"])

    # --- the end ---

    def forget(self, disk: ServedDisk) -> None:
        """Close a disk that is stopped."""
        del self.disks[disk.spec.name]
        self.process.host.store.close(self.process, disk.storage)
        self._exit_if_terminated()

    def remove_storage(self, storage: Storage, why: str) -> None:
        """Act on the storage's going away."""
        for disk in list(self.disks.values()):
            if disk.storage is storage:
                self.process.host.causes.strike(disk.spec.name, "its storage was removed")
                self.process.run(partial(self._remove_served, disk, why))

    def _remove_served(self, disk: ServedDisk, why: str) -> None:
        if self.disks.get(disk.spec.name) is disk:
            disk.remove(why)

    def died(self) -> None:
        """Close what a process has open but its storage, which the kernel may still use."""
        self._bus.close()
        for disk in self.disks.values():
            for connection in disk.connections:
                connection.closed = True
        for end in list(self.process.ends):
            end.close()

    def close_storages(self) -> None:
        """Let go of the storage, and of its locks."""
        for disk in self.disks.values():
            self.process.host.store.close(self.process, disk.storage)

"""The host: all that outlives a controller."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from reactor.control import tags
from reactor.messages import BOOT_FAILURE, HANDOVERS, SHORTAGE, Message, decode, encode
from reactor.spec import DiskSpec
from tests.simulation.bus import Hub
from tests.simulation.causes import Causes
from tests.simulation.faults import Faults
from tests.simulation.kernel import Driver
from tests.simulation.processes import WorkerProcess
from tests.simulation.storage import Store
from tests.simulation.streams import End
from tests.simulation.worker import Worker
from tests.simulation.world import World

MAIL_MAX: Final = 11  # net.unix.max_dgram_qlen, and the one that is sent
INSTANCE: Final = "simulated"


class Mailbox:
    """A worker's datagram socket for descriptors."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.letters: deque[tuple[End, Message]] = deque()
        self.ends: dict[End, None] = {}  # that are on their way


class Host:
    """One machine with storage, a kernel, and a service."""

    def __init__(self, world: World, *, cpus: int, devices: int, has_netlink: bool) -> None:
        self.world = world
        self.cpus = cpus
        self.faults = Faults(world)
        self.causes = Causes(world)
        self.store = Store(world, self.faults, self.causes)
        self.driver = Driver(world, self.causes, devices, has_netlink=has_netlink)
        self.hub = Hub(world, self.faults)
        self.version = 1  # of the program that is installed
        self.controller_pid = 0  # of the living one
        #: For how long devices wait for a core's worker.
        self.awaited_seconds: Callable[[int], float] = lambda _core: 0.0
        self.saved: bytes | None = None
        self.boots = 1
        self.saves = 0  # how often that was replaced
        self.unsaved = False  # there is something that could not be saved
        self.core_locks: dict[int, WorkerProcess] = {}
        self.processes: dict[int, WorkerProcess] = {}  # by pid, until they are gone
        self._mailboxes: dict[int, Mailbox] = {}
        self._last_pid = 100

    # --- processes ---

    def new_pid(self) -> int:
        """Return a pid that nobody had."""
        self._last_pid += 1
        return self._last_pid

    def start_process(self, core: int) -> WorkerProcess:
        """Start a process that becomes the worker of `core`."""
        process = WorkerProcess(self, self.new_pid(), core)
        self.processes[process.pid] = process
        self.world.note("%s is started", process)
        return process

    def make_worker(self, process: WorkerProcess) -> Worker:
        """Return the worker that a process becomes."""
        return Worker(process)

    def process_gone(self, process: WorkerProcess) -> None:
        """Forget a process."""
        self.world.note("%s is gone", process)
        del self.processes[process.pid]
        if process.status == BOOT_FAILURE:
            self.causes.could_not_start(process.core, self.awaited_seconds(process.core))
        if process.status not in (0, SHORTAGE):
            self.causes.died(process.core)
        if self.core_locks.get(process.core) is process:
            del self.core_locks[process.core]

    def does(self, what: object) -> bool:
        """Whether something is still done that a process, even a dead one, was asked for."""
        return any(process.does(what) for process in self.processes.values())

    def crash(self, *, keeps_state: bool) -> None:
        """Lose power: nothing is left but what is durable. The controller is dead already."""
        self.world.note("--- the host loses power; the saved state is left: %s ---", keeps_state)
        for process in list(self.processes.values()):
            process.vanish()
        self.boots += 1
        self.core_locks.clear()
        self._mailboxes.clear()
        self.driver.crash()
        self.store.crash()
        if not keeps_state:
            self.saved = None

    # --- descriptors for workers ---

    def open_mailbox(self, process: WorkerProcess) -> None:
        """Bind the datagram socket of a worker."""
        self._mailboxes[process.core] = Mailbox(process)

    def close_mailbox(self, process: WorkerProcess) -> None:
        """Close it, with what is in it."""
        mailbox = self._mailboxes.get(process.core)
        if mailbox is not None and mailbox.process is process:
            del self._mailboxes[process.core]
            for end in list(mailbox.ends):
                end.close()

    def send_mail(self, core: int, kind: str, end: End, fields: dict[str, Any]) -> None:
        """Send a copy of `end`; raises OSError."""
        header = decode(encode(kind, **fields), HANDOVERS)
        mailbox = self._mailboxes.get(core)
        if mailbox is None:
            raise ConnectionRefusedError(111, os.strerror(111))
        if len(mailbox.letters) >= MAIL_MAX:
            raise BlockingIOError(11, os.strerror(11))
        self.world.note("to worker core %d: connection %s", core, fields)
        mailbox.letters.append((end.dup(mailbox.ends), header))
        process = mailbox.process
        self.world.soon(
            0.01, process.run, lambda: process.worker and process.worker.take_descriptors()
        )

    def take_mail(self, process: WorkerProcess) -> list[tuple[End, Message]]:
        """Return what has come for a worker; it holds the ends from now on."""
        mailbox = self._mailboxes[process.core]
        assert mailbox.process is process
        taken = []
        while mailbox.letters:
            end, header = mailbox.letters.popleft()
            taken.append((end.dup(process.ends), header))
            end.close()
        return taken

    def hangs(self, spec: DiskSpec) -> bool:
        """Whether the medium of a disk that is to be opened does nothing."""
        storage = self.store.find(spec)
        if storage is None or not storage.hung:
            return False
        devices = [device for device in self.driver.configured() if not device.disconnected]
        if not any(tags.disk(device.tag) == spec.name for device in devices):
            self.causes.strike(spec.name, "did not answer start")  # nobody waits for longer
        return True

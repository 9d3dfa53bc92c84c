"""Worker processes as the kernel sees them: started, stopped, killed, and gone some time later."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from reactor.messages import BOOT_FAILURE, SHORTAGE
from tests.simulation.world import NS, Event, World

if TYPE_CHECKING:
    from tests.simulation.host import Host
    from tests.simulation.storage import Storage
    from tests.simulation.streams import End
    from tests.simulation.worker import Worker

LOCK_TRIES: Final = 10
LOCK_PAUSE: Final = 0.1
BOOT_SECONDS: Final = 0.5  # from exec to the first hello, usually
DRAIN_SECONDS: Final = 20.0  # after which one that was to drain and exit may be aborted
EXIT_SECONDS: Final = 0.05  # from the signal to the end of the process, at most


class Operation:
    """An operation of a process on its storage, which the kernel does in its time."""

    def __init__(
        self, process: WorkerProcess, storage: Storage, land: Callable[[], None], what: object
    ) -> None:
        self.storage = storage
        self.what = what
        self.event: Event | None = None
        self._process = process
        self._land = land

    def happen(self) -> None:
        """Do it, if the medium does anything."""
        world = self._process.world
        if self.storage.hung:
            self.event = world.after(0.1, self.happen)
            return
        self._land()
        self._process.operation_ended(self)


class WorkerProcess:
    """One process, that of `core`. See `reactor.control.platform.Process`."""

    def __init__(self, host: Host, pid: int, core: int) -> None:
        self.host = host
        self.world: World = host.world
        self.pid = pid
        self.core = core
        self._parent = host.controller_pid
        self._version = host.version
        self.alive = True  # it runs, or is stopped
        self.was_stopped = False  # ever
        self.gone = False
        self.stopped = False
        self._blocked = False  # it waits in the kernel for a medium, where no signal reaches it
        self._pending: list[int] = []  # signals meanwhile
        self._ran_until = 0  # when it was last stopped
        self._to_end_since: int | None = None  # when it was last asked to drain and exit
        self.worker: Worker | None = None
        self.ends: dict[End, None] = {}  # that it has open
        self.status = 0
        self.watcher: Callable[[int], None] | None = None
        self._operations: dict[Operation, None] = {}
        self._deferred: list[Callable[[], object]] = []
        self._exit_over = False
        slow = self.world.chance(0.05)
        self.world.after(self.world.between(0.05, 5.0 if slow else BOOT_SECONDS), self._boot)

    def __repr__(self) -> str:
        return f"worker-{self.core}-{self.pid}"

    @property
    def is_current(self) -> bool:
        """Whether it was started as workers are now."""
        return self._version == self.host.version

    def _boot(self) -> None:
        self.run(self._become_worker)

    def _become_worker(self, tries: int = LOCK_TRIES) -> None:
        if self._parent != self.host.controller_pid:
            self.exit(0)
            return
        if self.core in self.host.core_locks:
            if tries:
                again = partial(self._become_worker, tries - 1)
                self.world.after(LOCK_PAUSE, self.run, again)
            else:
                self.exit(BOOT_FAILURE)
            return
        if self.host.faults.strikes("a worker is short of memory", self.core):
            self.exit(SHORTAGE)
            return
        if self.host.faults.strikes("a worker cannot start", self.core):
            self.exit(BOOT_FAILURE)
            return
        if self.host.faults.strikes("a worker dies as it boots", self.core):
            self.exit(-signal.SIGABRT)
            return
        self.host.core_locks[self.core] = self
        self.host.causes.came_up(self.core)
        self.worker = self.host.make_worker(self)

    # --- running ---

    def run(self, function: Callable[[], object]) -> None:
        """Call `function` when the process gets to it; never, if it does not."""
        if not self.alive:
            return
        if self.stopped:
            self._deferred.append(function)
        else:
            function()

    def operate(self, storage: Storage, land: Callable[[], None], what: object) -> None:
        """Have the kernel do something to the storage, as `what` asks."""
        operation = Operation(self, storage, land, what)
        self._operations[operation] = None
        slow = self.world.chance(0.03)
        seconds = self.world.between(0, 4.0 if slow else 0.002)
        operation.event = self.world.after(seconds, operation.happen)

    def does(self, what: object) -> bool:
        """Whether the kernel still does for it what was asked."""
        return any(operation.what is what for operation in self._operations)

    def operation_ended(self, operation: Operation) -> None:
        """Forget an operation."""
        self._operations.pop(operation, None)
        self._end_if_over()

    # --- signals ---

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        if not self.alive:
            return
        self.world.note("%s gets signal %d", self, number)
        if self._blocked:
            self._pending.append(number)
        elif number == signal.SIGKILL:
            self.exit(-number)
        elif number == signal.SIGABRT:
            if not self.was_stopped and not self._drains_for_long():
                self.world.violate(f"{self} is aborted, and never hung")
            if self.stopped:  # of all that it does when it goes on, this is the first
                self._deferred.insert(0, lambda: self.exit(-signal.SIGABRT))
            else:
                self.exit(-signal.SIGABRT)
        elif number == signal.SIGTERM:
            self._to_end_since = self.world.now
            self.run(self._terminate)
        elif number == signal.SIGSTOP:
            self.stopped = self.was_stopped = True
            self._ran_until = self.world.now
        elif number == signal.SIGCONT:
            self._go_on()

    def waits_for_medium(self) -> bool:
        """Whether not even SIGKILL ends it."""
        ends = self.has_hung_operation() and not self.gone and not self.alive
        return ends or (self._blocked and self.alive)

    def block(self) -> None:
        """Have it wait for a medium."""
        self.send_signal(signal.SIGSTOP)
        self._blocked = True

    def unblock(self) -> None:
        """Have the medium answer."""
        if self._blocked:
            self._blocked = False
            for number in [*self._pending, signal.SIGCONT]:
                self.send_signal(number)
            self._pending.clear()

    def has_hung_operation(self) -> bool:
        """Whether it has begun what the medium does not do."""
        return any(operation.storage.hung for operation in self._operations)

    def progress(self) -> int:
        """Return a number that is another one whenever it has run."""
        return self._ran_until if self.stopped else self.world.now

    def _drains_for_long(self) -> bool:
        since = self._to_end_since
        return since is not None and self.world.now - since > DRAIN_SECONDS * NS

    def _terminate(self) -> None:
        if self.worker is None:
            self.exit(-signal.SIGTERM)
        else:
            self.worker.terminate()

    def _go_on(self) -> None:
        self.stopped = False
        deferred, self._deferred = self._deferred, []
        for function in deferred:
            self.run(function)

    # --- the end ---

    def exit(self, status: int) -> None:
        """End: connections first, then what the kernel still does for it, then the process."""
        if not self.alive:
            return
        self.world.note("%s ends with status %d", self, status)
        self.alive = False
        self.status = status
        for operation in list(self._operations):
            if not operation.storage.hung and self.world.chance(0.5):
                assert operation.event is not None
                operation.event.cancel()
                del self._operations[operation]
        self.world.soon(EXIT_SECONDS, self._close)

    def vanish(self) -> None:
        """End with the host."""
        self.alive = False
        self.gone = True
        for operation in self._operations:
            assert operation.event is not None
            operation.event.cancel()
        self._operations.clear()
        if self.worker is not None:
            self.worker.died()
            self.worker.close_storages()
        for end in list(self.ends):
            end.close()
        self.host.processes.pop(self.pid, None)

    def _close(self) -> None:
        if self.worker is not None:
            self.worker.died()
        self.host.close_mailbox(self)
        self.world.soon(EXIT_SECONDS, self._exit_ends)

    def _exit_ends(self) -> None:
        self._exit_over = True
        self._end_if_over()

    def _end_if_over(self) -> None:
        if not self._exit_over or self._operations or self.gone:
            return
        self.gone = True
        if self.worker is not None:
            self.worker.close_storages()
        self.host.process_gone(self)
        if self.watcher is not None:
            self.watcher(self.status)

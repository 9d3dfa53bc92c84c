"""One run: a host, a service, an operator, programs and faults, all from one seed."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import signal
from collections.abc import Callable, Iterator
from typing import Final

from reactor.errors import ReactorError
from tests.simulation.faults import NO_SOCKET, SHORTAGES, error
from tests.simulation.host import Host
from tests.simulation.operations import Operator
from tests.simulation.oracle import Oracle
from tests.simulation.processes import WorkerProcess
from tests.simulation.service import Service
from tests.simulation.world import NS, Violation, World

TURNS_MAX: Final = 200_000
SETTLE_SECONDS: Final = 200.0  # after the last fault
QUIET_SECONDS: Final = 4.0  # for which nothing must change
STOP_SECONDS: Final = 150.0


class Scenario:
    """Everything that one seed makes happen."""

    def __init__(self, seed: int, *, tracing: bool = False) -> None:
        self.world = World(seed, tracing=tracing)
        random = self.world.random
        cpus = random.randint(1, 4)
        cores = sorted(random.sample(range(cpus), random.randint(1, min(cpus, 3))))
        self.host = Host(
            self.world,
            cpus=cpus,
            devices=random.choice((2, 5, 8, 8)),
            has_netlink=random.random() < 0.9,
        )
        self.service = Service(self.host, cores, ())
        self.service.on_death = self._on_death
        self.service.on_stop = self._on_stop
        self.operator = Operator(self.host, self.service)
        self.service.on_start = self.operator.starts
        self.oracle = Oracle(self.host, self.service, self.operator)
        self._healed = False
        self._phase_over = False

    def run(self) -> list[str]:
        """Return what went wrong."""
        with _logged_to(self.world):
            try:
                self._run()
            except Violation as violation:
                self.world.violate(str(violation))
            except ReactorError as refusal:
                self.world.violate(f"the service does not start: {refusal}")
            finally:
                if self.service.platform is not None:
                    self.service.restarts = False
                    self.service.platform.reactor.close()
        return self.world.violations

    def _run(self) -> None:
        world = self.world
        world.note("faults: %s", self.host.faults)
        seconds = world.between(5, 60)
        self._plan(seconds)
        self.service.start()
        self._go_on(seconds)
        world.note("--- no more faults ---")
        self._heal()
        self._await(self.oracle.is_settled, SETTLE_SECONDS, "it does not settle")
        for subject in self.operator.subjects.values():
            subject.application.finish()
        self._await(self.oracle.is_idle, SETTLE_SECONDS, "requests are not answered")
        if world.violations:
            return
        self.oracle.check()
        if not world.violations:
            self._stop()

    def _stop(self) -> None:
        assert self.service.controller is not None
        self.world.note("--- stop ---")
        self.oracle.expect_stop()
        self.service.restarts = False
        self.service.controller.shut_down()
        self._await(lambda: self.service.stopped, STOP_SECONDS, "it does not stop", quiet=0)
        self._world_after_stop()

    def _world_after_stop(self) -> None:
        self.service.end()
        self._go_on(5.0)
        self.oracle.check_stopped(keeps=self.service.kept)

    # --- time ---

    def _go_on(self, seconds: float) -> None:
        """Let so much time pass."""
        self._phase_over = False
        self.world.after(seconds, self._end_phase)
        self._turn_while(lambda: not self._phase_over)

    def _end_phase(self) -> None:
        self._phase_over = True
        if self.service.platform is not None:
            self.service.platform.asleep = False

    def _await(
        self, true: Callable[[], bool], seconds: float, problem: str, quiet: float = QUIET_SECONDS
    ) -> None:
        """Let time pass until something has been true for a while."""
        world = self.world
        deadline = world.now + int(seconds * NS)
        since = None
        while since is None or world.now - since < quiet * NS:
            if world.violations:
                return
            if world.now > deadline:
                raise Violation(f"{problem}: {self.oracle.describe()}")
            if self.service.stopped:
                if not true():
                    raise Violation(problem)
                return
            self._go_on(0.5 if quiet else 0.05)
            since = (since or world.now) if true() else None

    def _turn_while(self, true: Callable[[], bool]) -> None:
        turns = 0
        while true() and not self.world.violations and not self.service.stopped:
            turns += 1
            if turns > TURNS_MAX:
                raise Violation("it never rests")
            self.service.turn()

    # --- what happens ---

    def _plan(self, seconds: float) -> None:
        world, random = self.world, self.world.random
        for happen, most in (
            (self.operator.ask_something, 20),
            (self.service.die, 6),
            (self._kill_worker, 12),
            (self._stop_worker, 3),
            (self._block_worker, 2),
            (self._pause_controller, 2),
            (self._remove_storage, 1),
            (self._lose_storage, 2),
            (self._hang_storage, 2),
            (self._refuse_storage, 1),
            (self._kill_all, 2),
            (self.operator.restart, 2),
            (self._leave_core, 2),
            (self._short_of_memory, 1),
            (self._fill, 1),
            (self._crash, 1),
        ):
            if random.random() < (0.15 if happen == self._crash else 0.6):
                times = [random.random() * seconds for _ in range(random.randint(1, most))]
                if random.random() < 0.3:  # in quick succession
                    times = [times[0] + time / 20 for time in times]
                for time in times:
                    world.after(time, self._unless_healed, happen)

    def _unless_healed(self, happen: Callable[[], object]) -> None:
        if not self._healed:
            happen()

    def _heal(self) -> None:
        self._healed = True
        self.host.faults.end()
        self.operator.tires = True
        self.host.store.heal()
        for process in list(self.host.processes.values()):
            process.unblock()
            if process.stopped and (process.worker is None or self.world.chance(0.5)):
                process.send_signal(signal.SIGCONT)

    def _on_death(self) -> None:
        self.operator.forget_questions()

    def _on_stop(self) -> None:
        self.operator.stopped()

    def _victim(self) -> WorkerProcess | None:
        processes = [p for p in self.host.processes.values() if p.alive]
        return self.world.random.choice(processes) if processes else None

    def _kill_worker(self) -> None:
        victim = self._victim()
        if victim is not None:
            victim.send_signal(signal.SIGKILL)

    def _stop_worker(self) -> None:
        victim = self._victim()
        if victim is not None:
            victim.send_signal(signal.SIGSTOP)
            if self.world.chance(0.5):
                seconds = self.world.between(0.1, 20)
                self.world.after(seconds, victim.send_signal, signal.SIGCONT)

    def _block_worker(self) -> None:
        victim = self._victim()
        if victim is not None:
            victim.block()
            self.world.after(self.world.between(0.1, 40), victim.unblock)

    def _pause_controller(self) -> None:
        platform = self.service.platform
        if platform is not None and not platform.paused:
            platform.pause()
            self.world.after(self.world.between(0.5, 40), platform.go_on)

    def _crash(self) -> None:
        """Take the power away, with the runtime directory in memory or on a disk."""
        keeps_state = self.world.chance(0.5)
        self.service.die()
        self.operator.crashed(keeps_state=keeps_state)
        self.host.crash(keeps_state=keeps_state)

    def _short_of_memory(self) -> None:
        """Have all processes, or one worker, lack what they need, for a while."""
        random, faults = self.world.random, self.host.faults
        faults.short = random.sample(SHORTAGES, random.randint(1, len(SHORTAGES)))
        most = 20
        if self.world.chance(0.5):
            faults.short_core, most = random.choice(self.service.options.cores), 100
        else:
            self.host.causes.strike("", os.strerror(NO_SOCKET))
        self.world.note("shortage: %s of core %s", faults.short, faults.short_core)
        self.world.after(self.world.between(0.5, most), self._memory_again)

    def _fill(self) -> None:
        self.world.note("there is no room for the saved state")
        self.host.faults.full = True
        self.world.after(self.world.between(0.5, 30), self._empty)

    def _empty(self) -> None:
        self.host.faults.full = False

    def _memory_again(self) -> None:
        self.host.faults.short, self.host.faults.short_core = (), None

    def _kill_all(self) -> None:
        self.service.die()
        for process in list(self.host.processes.values()):
            process.send_signal(signal.SIGKILL)

    def _leave_core(self) -> None:
        """Have a next controller without the core of a worker that is slow to end, or hangs."""
        victim = self._victim()
        if victim is None or victim.worker is None:
            return
        self.operator.avoided = victim.core
        impatient = self._impatient()
        for disk in victim.worker.disks.values():
            if disk.storage not in impatient and not disk.storage.hung and self.world.chance(0.5):
                self.world.note("%s hangs", disk.storage)
                disk.storage.hung = True
                self.world.after(self.world.between(0.5, 40), self._unhang, disk.storage)
        if self.world.chance(0.3):
            victim.send_signal(self.world.random.choice((signal.SIGKILL, signal.SIGSTOP)))
        self.service.die()

    def _remove_storage(self) -> None:
        name = self.world.random.choice(list(self.operator.subjects))
        for process in list(self.host.processes.values()):
            if process.worker is not None and name in process.worker.disks:
                self.operator.excuse(name)
                process.worker.remove_storage(process.worker.disks[name].storage, "it vanished")

    def _lose_storage(self) -> None:
        """Move storage away, or cut it, while nobody serves it; memory also while somebody does."""
        storage, chance = self.host.store.pick(), self.world.chance
        if storage is None or storage.key.startswith("null"):
            return
        name = storage.key.rpartition("/")[2].removeprefix("malloc ")
        self.operator.excuse(name)
        is_file = storage.key.startswith("file")
        if is_file or chance(0.5):
            for process in list(storage.openers):
                process.send_signal(signal.SIGKILL)
        if is_file and chance(0.3) and not self.host.unsaved:
            self.host.store.cut(storage)
        else:
            self.host.store.lose(storage)
        if chance(0.5):
            self.service.die()
        if chance(0.7):
            seconds = self.world.between(0.5, 30)
            self.world.after(seconds, self._bring_back, name, storage.key)

    def _bring_back(self, name: str, key: str) -> None:
        self.operator.excuse(name)
        self.host.store.bring_back(key)

    def _hang_storage(self) -> None:
        storage = self.host.store.pick()
        if storage is None:
            return
        self.world.note("%s hangs", storage)
        storage.hung = True
        devices = self.host.driver.configured()
        awaited = [d for d in devices if d.dead_timeout == 600 and not d.disconnected]
        # Longer than a disk's timeout it must not be: that is documented to cost data.
        least, most = (0.5, 3) if storage in self._impatient() else (0.5, 15)
        among = storage in [device.storage for device in awaited]
        if most > 3 and among and self.world.chance(0.3):
            least, most = 60, 100
            storage.outlasts = storage.outlasted = True
            for process in list(storage.openers):
                process.send_signal(signal.SIGKILL)
            # Nobody waits for so long for another disk of that worker without such a device.
            patient = [device.disk for device in awaited]
            for name in self.operator.subjects:
                if name not in patient:
                    self.host.causes.strike(name, "did not answer start")
        self.world.after(self.world.between(least, most), self._unhang, storage)

    def _refuse_storage(self) -> None:
        name = self.world.random.choice(list(self.operator.subjects))
        self.operator.excuse(name)
        refusal = error(self.world.random.choice((errno.EIO, errno.ENOENT)))
        self.world.note("the storage of disk %s cannot be opened now: %s", name, refusal)
        self.host.store.refusals[name] = refusal
        seconds = self.world.between(0.5, 10)
        self.world.after(seconds, self.host.store.refusals.pop, name, None)

    def _impatient(self) -> list[object]:
        """Return the storage of which the kernel may send a request to two workers."""
        return [
            socket.side.stream.storage
            for device in self.host.driver.configured()
            for socket in device.sockets
            if device.timeout
        ]

    def _unhang(self, storage: object) -> None:
        storage.hung = storage.outlasts = False  # type: ignore[attr-defined]


class _Log(logging.Handler):
    """Takes the program's log into the trace; a traceback in it is a bug."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            bug = record.exc_info[1]
            self._world.violate(f"a bug: {record.getMessage()}: {type(bug).__name__}: {bug}")
            if self._world.trace is not None:
                self._world.note("%s", logging.Formatter().formatException(record.exc_info))
        elif self._world.trace is not None:
            self._world.note("log: %s: %s", record.levelname, record.getMessage())


@contextlib.contextmanager
def _logged_to(world: World) -> Iterator[None]:
    log = logging.getLogger("reactor")
    before = (log.handlers[:], log.level, log.propagate)
    log.handlers, log.propagate = [_Log(world)], False
    log.setLevel(logging.DEBUG if world.trace is not None else logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        log.handlers, level, log.propagate = before
        log.setLevel(level)

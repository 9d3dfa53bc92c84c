"""A host whose service is to meet one thing, told by a test, instead of what a seed brings."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace

from reactor.control.plan import Placement
from reactor.control.saved import decode
from reactor.spec import DiskSpec
from tests.simulation.application import Application
from tests.simulation.host import INSTANCE, Host
from tests.simulation.kernel import KernelDevice
from tests.simulation.processes import WorkerProcess
from tests.simulation.service import Service
from tests.simulation.storage import Storage
from tests.simulation.worker import Worker
from tests.simulation.world import NS, World

MIB = 1 << 20


class Hosts:
    """A service with a disk on each of two cores and one on both; nothing fails but what is told.

    The one on both is of null, which only the controller keeps to those that may have it.
    """

    def __init__(self, seed: int) -> None:
        self.world = World(seed, tracing=True)
        self.host = Host(self.world, cpus=2, devices=4, has_netlink=True)
        self.host.faults.end()
        config = [
            DiskSpec("stays", "malloc", {"size": MIB}, device="auto", core=0),
            DiskSpec("moves", "malloc", {"size": MIB}, device="auto", core=1),
            DiskSpec("plain", "null", {"size": MIB}, core=1),
            DiskSpec("wide", "malloc", {"size": MIB}, device="auto", connections=2),
        ]
        self.service = Service(self.host, (0, 1), config)
        self.applications = [Application(self.host, spec.name, self._error) for spec in config]
        self.service.start()
        self.await_states(stays="online", moves="online", plain="online", wide="online")

    def _error(self, name: str, *_: object) -> None:
        self.world.violate(f"an I/O error on disk {name}")

    def worker(self, core: int) -> WorkerProcess:
        return self.host.core_locks[core]

    def workers(self) -> list[Worker]:
        return [process.worker for process in self.host.core_locks.values() if process.worker]

    def storages(self, process: WorkerProcess) -> list[Storage]:
        assert process.worker is not None
        return [disk.storage for disk in process.worker.disks.values() if not disk.shared]

    def states(self) -> dict[str, str]:
        controller = self.service.controller
        return {d.spec.name: d.state for d in controller.disks()} if controller else {}

    def reasons(self) -> dict[str, str]:
        assert self.service.controller is not None
        return {d.spec.name: d.reason for d in self.service.controller.disks()}

    def let_pass(self, seconds: float) -> None:
        self._await(lambda: False, seconds)

    def await_states(self, **wanted: str) -> None:
        self._await(lambda: self.states() == wanted, 60)
        assert self.states() == wanted

    def await_true(self, true: Callable[[], bool]) -> None:
        self._await(true, 60)
        assert true()

    def _await(self, true: Callable[[], bool], seconds: float) -> None:
        end = self.world.now + int(seconds * NS)
        self.world.after(seconds, self._wake)
        while not true() and self.world.now < end:
            self.service.turn()
            assert not self.world.violations

    def _wake(self) -> None:
        if self.service.platform is not None:
            self.service.platform.asleep = False

    def move_to_core_0(self) -> None:
        """Kill the controller; the next one has only one core."""
        self.service.config = tuple(
            replace(spec, core=None) if spec.core == 1 else spec for spec in self.service.config
        )
        self.service.change(cores=(0,))
        self.service.die()

    def die(self) -> None:
        """End the controller and every worker."""
        self.service.die()
        for core in (0, 1):
            self.worker(core).send_signal(signal.SIGKILL)

    def configure(self, name: str, **keys: object) -> None:
        """Change what the config says of a disk; a reload reads it."""
        self.service.config = tuple(
            replace(spec, **keys) if spec.name == name else spec for spec in self.service.config
        )

    def reload(self) -> None:
        """Have the config read again."""
        assert self.service.controller is not None
        self.service.controller.reload(lambda _: None)

    def refuse_growth(self, name: str, **keys: object) -> None:
        """Ask by the config for 8 MiB, of which the storage has half; other `keys` may change."""
        self.host.store.sizes_max[name] = 4 * MIB
        self.configure(name, options={"size": 8 * MIB}, **keys)
        self.reload()
        self.let_pass(5)

    def refuse_cut(self, done: Callable[[Exception | None], None]) -> WorkerProcess:
        """Begin to cut "wide"; returns its leader, which is stopped and will refuse that."""
        controller = self.service.controller
        assert controller is not None
        self.finish_applications()
        leader = self.worker(controller.disk("wide").cores[0])
        leader.send_signal(signal.SIGSTOP)
        self.host.faults.short = ("a resize is refused",)
        controller.resize("wide", MIB // 2, done)
        self.await_true(lambda: device_of(self, "wide").size == MIB // 2)
        self.let_pass(0.1)
        return leader

    def finish_applications(self) -> None:
        """Have nobody use a disk any more."""
        for application in self.applications:
            application.finish()
        self.let_pass(5)

    def free(self, name: str) -> None:
        """Have a disk without device."""
        next(a for a in self.applications if a.disk == name).finish()
        controller = self.service.controller
        assert controller is not None
        device = {disk.spec.name: disk.device for disk in controller.disks()}[name]
        assert device is not None
        answers: list[Exception | None] = []
        controller.detach(device, answers.append)
        self.await_true(lambda: bool(answers))
        assert answers == [None]

    def misplace(self, name: str) -> None:
        """Kill the controller; the state it leaves has the disk on core 0, and on its way out."""
        host, platform = self.host, self.service.platform
        assert host.saved is not None
        assert platform is not None
        self.service.config = tuple(spec for spec in self.service.config if spec.name != name)
        state = decode(host.saved, INSTANCE, platform.boot)
        (wish,) = (wish for wish in state.wishes if wish.spec.name == name)
        spec, elsewhere = replace(wish.spec, core=None), Placement(0, (0,))
        misplaced = replace(wish, spec=spec, placement=elsewhere, desired="gone")
        wishes = [misplaced if other is wish else other for other in state.wishes]
        host.saved = replace(state, wishes=wishes).encode(INSTANCE, platform.boot)
        host.unsaved = True
        self.service.die()

    def signals(self, number: int, process: WorkerProcess) -> int:
        line = f"{process} gets signal {number}"
        return sum(line in noted for noted in self.world.trace or ())


def device_of(hosts: Hosts, disk: str) -> KernelDevice:
    return next(device for device in hosts.host.driver.configured() if device.disk == disk)

"""The service on the simulated host: one controller after the other, all of them real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from reactor.control import saved
from reactor.control.controller import Controller
from reactor.control.tags import prefix, tag
from reactor.options import Options
from reactor.spec import DiskSpec
from tests.simulation.host import INSTANCE, Host
from tests.simulation.platform import ControllerDied, SimulatedPlatform

NOWHERE: Final = Path("/nonexistent")


class Service:
    """What systemd starts, and starts again when it died. `config` is what the file says."""

    def __init__(self, host: Host, cores: Sequence[int], config: Sequence[DiskSpec]) -> None:
        self.config = tuple(config)
        self.options = Options(tuple(cores), NOWHERE, NOWHERE)
        self.controller: Controller | None = None
        self.platform: SimulatedPlatform | None = None
        self.on_death: Callable[[], None] = lambda: None
        self.on_stop: Callable[[], None] = lambda: None
        self.on_start: Callable[[], None] = lambda: None
        self.restarts = True
        self.kept = False  # devices, memory and state, by the one that stopped last
        self.exit_status = 0  # of it
        self.took_over = False  # disks of one that died, or was to keep them
        self._found_workers = False  # which have disks, and may say so or die before
        self._host = host
        host.awaited_seconds = self._awaited_seconds

    @property
    def stopped(self) -> bool:
        """Whether the controller has come to its orderly end."""
        return self.platform is not None and self.platform.reactor.stopped

    @property
    def listens(self) -> bool:
        """Whether there is a controller that would hear what is asked."""
        return self.platform is not None and not self.platform.paused

    def start(self) -> None:
        """Begin a controller's life."""
        self._host.world.note("the service starts on cores %s", self.options.cores)
        platform = self.platform = SimulatedPlatform(self._host)
        self._host.controller_pid = platform.pid
        self._host.causes.new_controller()
        state = self._host.saved
        found = saved.decode(state, INSTANCE, platform.boot) if state is not None else None
        if found is not None and self._host.unsaved:
            found = found.outdated()
        held = {tag(INSTANCE, spec) for spec in self.config} & set(platform.held(prefix(INSTANCE)))
        left = {spec.name for spec in self.config} & set(self._host.store.memories())
        self.took_over = bool(held or left) or (found is not None and bool(found.wishes))
        living = (process.worker for process in self._host.core_locks.values())
        self._found_workers = any(worker is not None and worker.disks for worker in living)
        try:
            controller = Controller(self.options, platform, lambda: self.config, {})
            self.controller = controller
            controller.begin(found, self.config)
        except ControllerDied:
            self._bury()

    def turn(self) -> None:
        """Let the controller do something, or else the rest of the world."""
        if self.platform is None:
            self._host.world.happen()
            return
        try:
            self.platform.reactor.turn()
            if self.stopped and self.restarts:
                self.end()
                self.on_stop()
                self._restart()
        except ControllerDied:
            self._bury()

    def die(self) -> None:
        """Kill the controller."""
        if self.platform is not None:
            self._host.world.note("the controller is killed")
            self.platform.die()

    def change(self, **options: object) -> None:
        """Have other options at the next start."""
        self.options = replace(self.options, **options)  # type: ignore[arg-type]

    def end(self) -> None:
        """Do what the process does after its loop has ended."""
        assert self.platform is not None
        assert self.controller is not None
        platform = self.platform
        self.controller.close()
        self.kept, self.exit_status = self.controller.keeps, self.controller.exit_status
        either = bool(self.exit_status) and self._found_workers
        if self.kept != self.must_keep(self.exit_status) and not either:
            self._host.world.violate(f"status {self.exit_status}, devices kept: {self.kept}")
        if not self.kept:
            self._host.saved = None
        self._leave(platform)
        platform.die()

    def must_keep(self, exit_status: int) -> bool:
        """Whether devices, memory and state must stay: by option, or as a strict start failed."""
        return self.options.on_exit == "keep" or (bool(exit_status) and self.took_over)

    def _awaited_seconds(self, core: int) -> float:
        disks = self.controller._disks.values() if self.controller is not None else ()
        on_core = (disk for disk in disks if disk.path and core in disk.placement.cores)
        return max((float(disk.spec.dead_timeout) for disk in on_core), default=0.0)

    def _bury(self) -> None:
        assert self.platform is not None
        platform = self.platform
        platform.die()
        self.exit_status = self.controller.exit_status if self.controller is not None else 0
        self._leave(platform)
        self.on_death()
        if self.restarts:
            self._restart()

    def _restart(self) -> None:
        world = self._host.world
        world.after(world.between(0.05, 3.0), self._start_again)

    def _leave(self, platform: SimulatedPlatform) -> None:
        self.controller = self.platform = None
        self._host.controller_pid = 0
        platform.reactor.close()

    def _start_again(self) -> None:
        if self.platform is None:
            self.on_start()
            self.start()

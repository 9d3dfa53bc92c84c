"""All workers of a service: started anew, or taken over from a controller that died."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from reactor.control.platform import Bus, Platform, Process
from reactor.control.workers import WorkerProcess
from reactor.errors import reason
from reactor.log import logger
from reactor.messages import Message

log = logger(__name__)


class Workforce:
    """A worker for each core.

    Living workers of cores that have none now are ended first, as what they serve goes to others.
    Those that were started in another way (by another version, say) are replaced one by one.
    """

    def __init__(
        self,
        platform: Platform,
        bus: Bus,
        cores: Iterable[int],
        on_change: Callable[[WorkerProcess], None],
        on_hello: Callable[[WorkerProcess, Message], None],
    ) -> None:
        def worker(core: int) -> WorkerProcess:
            return WorkerProcess(platform, bus, core, self._changed, on_hello)

        self.by_core = {core: worker(core) for core in cores}
        self.adopted: dict[int, Process] = {}  # those that serve on
        self._platform = platform
        self._on_change = on_change
        self._retiring: list[WorkerProcess] = []
        self._foreign: dict[int, Process] = {}  # those that wait to be replaced
        self._begun = self._ending = False
        self._survivors = platform.survivors()
        for survivor in self._survivors:
            if survivor.core not in self.by_core:
                self._retiring.append(worker(survivor.core))
            elif survivor.is_ours:
                self.adopted[survivor.core] = survivor.process
            else:
                self._foreign[survivor.core] = survivor.process

    @property
    def up(self) -> bool:
        """Whether every worker runs or was given up."""
        return all(worker.state in ("running", "failed") for worker in self.by_core.values())

    @property
    def gone(self) -> bool:
        """Whether no process is left."""
        processes = (*self.by_core.values(), *self._retiring)
        return not self._foreign and all(worker.pid is None for worker in processes)

    def begin(self) -> None:
        """Start, or take over, every worker."""
        processes = {survivor.core: survivor.process for survivor in self._survivors}
        for worker in self._retiring:
            worker.retire(processes[worker.core])
        if not self._retiring:
            self._start()

    def speaker(self, identity: bytes) -> WorkerProcess | None:
        """Return the living worker of a message."""
        return next((w for w in self.by_core.values() if w.owns(identity)), None)

    def look_after(self, *, keep_spare: bool) -> None:
        """End workers that hang; called every second."""
        for worker in (*self.by_core.values(), *self._retiring):
            worker.look_after()
        if keep_spare and all(worker.state == "running" for worker in self.by_core.values()):
            try:
                self._platform.keep_spare()
            except OSError as error:
                log.warning("no spare worker can be started: %s", reason(error))

    def shut_down(self) -> None:
        """Have every worker end, all disks being stopped."""
        self._ending = True
        if not self._begun:
            self._foreign.update(self.adopted)
        for core, process in self._foreign.items():
            self.by_core[core].retire(process)
        self._foreign.clear()
        for worker in self.by_core.values():
            worker.shut_down()

    def kill(self, why: str) -> None:
        """Kill every worker."""
        for worker in (*self.by_core.values(), *self._retiring):
            worker.kill(why)

    def _start(self) -> None:
        self._begun = True
        for core, worker in self.by_core.items():
            if core in self.adopted:
                worker.adopt(self.adopted[core])
            elif core not in self._foreign:
                worker.spawn()
        self._replace_next()

    def _replace_next(self) -> None:
        others = (worker for core, worker in self.by_core.items() if core not in self._foreign)
        if self._foreign and all(worker.state in ("running", "failed") for worker in others):
            core, process = self._foreign.popitem()
            self.by_core[core].replace(process)

    def _changed(self, worker: WorkerProcess) -> None:
        if worker in self._retiring:
            self._retiring.remove(worker)
            if not self._ending:
                if not self._retiring:
                    self._start()
                return
        self._on_change(worker)
        if not self._ending:
            self._replace_next()

"""All workers of a service: started anew, or taken over from a controller that died."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from reactor.control.platform import Bus, Platform
from reactor.control.workers import WorkerProcess
from reactor.errors import reason
from reactor.log import logger
from reactor.messages import Message

log = logger(__name__)


class Workforce:
    """A worker for each core, and those that leave: living ones of cores that have none now.

    Those that were started in another way (by another version, say) are replaced one by one.
    """

    def __init__(
        self,
        platform: Platform,
        bus: Bus,
        cores: Iterable[int],
        patience: Callable[[WorkerProcess], float],
        on_change: Callable[[WorkerProcess], None],
        on_hello: Callable[[WorkerProcess, Message], None],
    ) -> None:
        def worker(core: int) -> WorkerProcess:
            return WorkerProcess(platform, bus, core, patience, self._changed, on_hello)

        self._platform = platform
        self._on_change = on_change
        self._survivors = {survivor.core: survivor for survivor in platform.survivors()}
        self.by_core = {core: worker(core) for core in cores}
        leaving = self._survivors.keys() - self.by_core.keys()
        self.leaving = {core: worker(core) for core in sorted(leaving)}
        self.everyone = {**self.by_core, **self.leaving}

    @property
    def survivors(self) -> tuple[int, ...]:
        """The cores whose workers were alive at the start."""
        return tuple(sorted(self._survivors))

    @property
    def adopted(self) -> set[int]:
        """The cores whose workers serve on."""
        return {core for core in self.by_core if self._is_ours(core)}

    @property
    def up(self) -> bool:
        """Whether every worker runs or was given up."""
        return all(worker.state in ("running", "failed") for worker in self.by_core.values())

    @property
    def known(self) -> bool:
        """Whether every worker has said what it has, or is gone."""
        return not any(worker.unknown for worker in self.everyone.values())

    @property
    def gone(self) -> bool:
        """Whether no process is left."""
        return all(worker.pid is None for worker in self.everyone.values())

    def begin(self) -> None:
        """Start, or take over, every worker; have those that leave end."""
        for core, worker in self.leaving.items():
            worker.retire(self._survivors[core].process)
        for core, worker in self.by_core.items():
            if self._is_ours(core):
                worker.adopt(self._survivors[core].process)
            elif core in self._survivors:
                worker.let_serve(self._survivors[core].process)
            else:
                worker.spawn()
        self._replace_next()

    def speaker(self, identity: bytes) -> WorkerProcess | None:
        """Return the living worker of a message."""
        return next((w for w in self.everyone.values() if w.owns(identity)), None)

    def look_after(self, *, keep_spare: bool) -> None:
        """End workers that hang; called every second."""
        for worker in self.everyone.values():
            worker.look_after()
        self._replace_next()
        if keep_spare and all(worker.state == "running" for worker in self.by_core.values()):
            try:
                self._platform.keep_spare()
            except OSError as error:
                log.warning("no spare worker can be started: %s", reason(error))

    def shut_down(self) -> None:
        """Have every worker end, all disks being stopped."""
        for worker in self.everyone.values():
            worker.shut_down()

    def kill(self, why: str) -> None:
        """Kill every worker."""
        for worker in self.everyone.values():
            worker.kill(why)

    def _is_ours(self, core: int) -> bool:
        survivor = self._survivors.get(core)
        return survivor is not None and survivor.is_ours

    def _replace_next(self) -> None:
        """Replace one when nothing is to be expected of the others that could not wait for it."""
        outdated = [worker for worker in self.by_core.values() if worker.is_outdated]
        others = (worker for worker in self.by_core.values() if worker not in outdated)
        if outdated and all(w.state in ("running", "failed") or w.is_blocked for w in others):
            outdated[0].replace()

    def _changed(self, worker: WorkerProcess) -> None:
        self._on_change(worker)
        self._replace_next()

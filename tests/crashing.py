"""A service whose processes die at any moment, and whose controller is then started again."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.running import RunningService

#: What is done to the service, and how often in a hundred; of the rest, a worker is killed.
KINDS = {
    "controller killed": 28,
    "both killed": 24,
    "worker hung": 8,
    "worker hung, controller killed": 4,
}
#: The controller gives a worker up that dies ten times in a row, each within a minute: by design.
IN_A_ROW_MAX = 5
HASTY = 0.2  # how many come before the last one is overcome
PAUSE_SECONDS = 1.5  # at most


@dataclass(frozen=True)
class Strike:
    """One crash."""

    kind: str
    pause: float  # seconds before it
    hasty: bool  # it does not wait until the one before is overcome


def strikes(count: int, seed: int) -> list[Strike]:
    """Return what happens to the service, in an order that `seed` decides."""
    chance = random.Random(seed)
    left = {kind: max(1, round(count * share / 100)) for kind, share in KINDS.items()}
    left["worker killed"] = max(0, count - sum(left.values()))
    drawn: list[Strike] = []
    in_a_row = 0
    while len(drawn) < count:
        kinds = [kind for kind, number in left.items() if number]
        spared = [k for k in kinds if in_a_row < IN_A_ROW_MAX or "controller" in k or "both" in k]
        kind = chance.choices(spared or ["both killed"], [left[k] for k in spared] or None)[0]
        left[kind] = max(0, left[kind] - 1)
        in_a_row = in_a_row + 1 if kind in ("worker killed", "worker hung") else 0
        hasty = bool(drawn) and "hung" not in drawn[-1].kind and chance.random() < HASTY
        drawn.append(Strike(kind, chance.uniform(0, PAUSE_SECONDS), hasty))
    return drawn


class CrashingService:
    """The service on one runtime directory, over the lives of its processes."""

    def __init__(self, start: Callable[[], RunningService]) -> None:
        self.running = start()
        self._start = start
        self._struck: list[psutil.Process] = []

    def strike(self, kind: str) -> None:
        """Do to it what the name of a kind says."""
        for worker in workers():
            with suppress(psutil.NoSuchProcess):  # it is just ending by itself
                if "worker hung" in kind:
                    if " -m reactor.data" in " ".join(worker.cmdline()):
                        continue  # without the controller that started it nobody would know of it
                    worker.suspend()
                elif kind != "controller killed":
                    worker.kill()
                if kind != "controller killed":
                    self._struck.append(worker)
        if "controller" in kind or "both" in kind:
            self.running.process.kill()
            self.running.process.wait()
            self.running = self._start()

    def overcome(self) -> bool:
        """Whether other workers are in the place of those struck, and all disks are online."""
        assert self.running.process.poll() is None, self.running.log
        try:
            found = self.running.rpc("reactor_get_workers")
            disks = self.running.rpc("reactor_get_disks")
        except OSError:  # it is still starting
            return False
        assert not any(disk["state"] in ("failed", "removed") for disk in disks), disks
        return (
            all(worker["state"] == "running" for worker in found)
            and all(disk["state"] == "online" for disk in disks)
            and not any(_lives(worker) for worker in self._struck)
        )

    def await_overcome(self, seconds: float) -> None:
        """Wait until it is."""
        deadline = time.monotonic() + seconds
        while not self.overcome():
            assert time.monotonic() < deadline, f"{self._left()}\n{self.running.log}"
            time.sleep(0.1)
        self._struck.clear()

    def _left(self) -> str:
        return "struck and alive: " + "\n".join(map(_stack, filter(_lives, self._struck)))


def _stack(process: psutil.Process) -> str:
    """Return what a process is and where it is in the kernel, for a failure's message."""
    with suppress(psutil.NoSuchProcess, OSError):
        stack = Path(f"/proc/{process.pid}/stack").read_text()
        return f"{process} of {process.ppid()} {process.cmdline()} in\n{stack}"
    return "one that has just ended"


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def workers() -> Iterator[psutil.Process]:
    """Return all workers on this machine, also those that are just starting."""
    for process in psutil.process_iter(["cmdline"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith("nbd-reactor: worker") or " -m reactor.data" in title:
            yield process

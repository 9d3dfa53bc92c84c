"""A worker as its controller sees it: spawned, watched, restarted with back-off."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from reactor.bus import ControllerBus, descriptor_socket, send_descriptors
from reactor.control.launcher import Launcher
from reactor.control.service import WorkerStatus
from reactor.log import logger
from reactor.loop import Reactor, Timer
from reactor.messages import encode

START_SECONDS: Final = 60.0  # from exec to hello
SILENCE_SECONDS: Final = 5.0  # without heartbeat a worker is not trusted to read its sockets
HANG_SECONDS: Final = 30.0  # without heartbeat it is killed
ABORT_SECONDS: Final = 2.0  # from SIGABRT (stack dump) to SIGKILL
BACKOFF_SECONDS: Final = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0)
STEADY_SECONDS: Final = 60.0  # a worker that lived so long starts its back-off anew
BOOT_FAILURE: Final = 3  # exit status: starting again will not help

State: TypeAlias = Literal["starting", "running", "waiting", "failed"]

log = logger(__name__)


class WorkerProcess:
    """The worker of one core, over all its lives. `on_change` comes when it is up or gone."""

    def __init__(
        self,
        reactor: Reactor,
        bus: ControllerBus,
        launcher: Launcher,
        runtime_dir: Path,
        core: int,
        on_change: Callable[[WorkerProcess], None],
    ) -> None:
        self.core = core
        self.state: State = "waiting"
        self.restarts = 0
        self.statistics: dict[str, int] = {}
        self._reactor = reactor
        self._bus = bus
        self._launcher = launcher
        self._on_change = on_change
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._identity = b""
        self._heard_ns = 0
        self._started_ns = 0
        self._quick_deaths = 0
        self._respawn: Timer | None = None
        self._stopping = False
        self._path = descriptor_socket(runtime_dir, core)

    # --- what it is ---

    @property
    def pid(self) -> int | None:
        """The living process, if there is one."""
        return self._process.pid if self._process is not None else None

    @property
    def healthy(self) -> bool:
        """Whether it runs and has been heard of lately."""
        return self.state == "running" and self._silence() < SILENCE_SECONDS

    @property
    def is_silent(self) -> bool:
        """Whether it lives, but has not been heard of for too long."""
        return self.state == "running" and self._silence() >= SILENCE_SECONDS

    def status(self, disks: tuple[str, ...]) -> WorkerStatus:
        """Return what front ends show."""
        return WorkerStatus(
            self.core, self.pid, self.state, self.restarts, disks, dict(self.statistics)
        )

    # --- what the supervisor does ---

    def spawn(self) -> None:
        """Start the process, by exec: nothing of the controller is shared."""
        self._respawn = None
        try:
            self._process = self._launcher.launch(self.core)
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:
            log.error("worker core %d cannot be started: %s", self.core, error)
            if self._process is not None:  # nobody could watch it
                self._process.kill()
                self._process.wait()
                self._process = None
            self._plan_respawn(quickly=True)
            self._on_change(self)
            return
        self._reactor.add_fd(self._pidfd, self._on_exit, name=f"worker {self.core}")
        self._identity = f"worker-{self.core}-{self._process.pid}".encode()
        self._started_ns = self._heard_ns = self._reactor.clock()
        self.state = "starting"

    def owns(self, identity: bytes) -> bool:
        """Whether a message under `identity` is from the living process."""
        return self._process is not None and identity == self._identity

    def heard(self, kind: str, reactor: dict[str, int] | None = None) -> None:
        """Note a sign of life."""
        self._heard_ns = self._reactor.clock()
        if reactor is not None:
            self.statistics = reactor
        if kind == "hello":
            self._bus.send(self._identity, "welcome")
            if self.state == "starting":
                self.state = "running"
                log.info("worker core %d runs (pid %s)", self.core, self.pid)
                self._on_change(self)

    def send(self, kind: str, **fields: Any) -> bool:
        """Send a command; False when it cannot be sent now."""
        return self.state == "running" and self._bus.send(self._identity, kind, **fields)

    def hand_over(self, kind: str, fds: list[int], **fields: Any) -> None:
        """Send descriptors; raises OSError."""
        send_descriptors(self._path, fds, encode(kind, **fields))

    def look_after(self) -> None:
        """End a worker that does not start or hangs; called every second."""
        if self._process is None:
            return
        limit = START_SECONDS if self.state == "starting" else HANG_SECONDS
        silence = self._silence()
        if silence > limit + ABORT_SECONDS:
            self.kill("it did not even abort")
        elif silence > limit and not self._stopping:
            log.error(
                "worker core %d (pid %s) is silent for %.0f s: aborted, its stack follows",
                *(self.core, self.pid, silence),
            )
            self._process.send_signal(signal.SIGABRT)

    def kill(self, why: str) -> None:
        """Kill the process now; its end comes by `on_change`."""
        if self._process is not None:
            log.warning("worker core %d (pid %s) is killed: %s", self.core, self.pid, why)
            self._process.kill()

    def shut_down(self) -> None:
        """Ask it to exit, all its disks being stopped, and do not start it again."""
        if self._stopping:
            return
        self._stopping = True
        if self._respawn is not None:
            self._respawn.cancel()
        if self._process is not None and not self.send("shutdown", id=0):
            self.kill("it is not connected")

    def revive(self) -> None:
        """Start again a worker that was given up."""
        if self.state == "failed":
            self._quick_deaths = 0
            self.spawn()

    # --- its death ---

    def _silence(self) -> float:
        return (self._reactor.clock() - self._heard_ns) / 1e9

    def _on_exit(self, _events: int) -> bool:
        assert self._process is not None
        status = self._process.wait()
        self._reactor.remove_fd(self._pidfd)
        os.close(self._pidfd)
        self._process = None
        self.statistics = {}
        if self._stopping:
            self.state = "waiting"
        else:
            log.error("worker core %d %s", self.core, _how_it_ended(status))
            lived = (self._reactor.clock() - self._started_ns) / 1e9
            self._plan_respawn(quickly=lived < STEADY_SECONDS, hopeless=status == BOOT_FAILURE)
        self._on_change(self)
        return True

    def _plan_respawn(self, *, quickly: bool, hopeless: bool = False) -> None:
        self._quick_deaths = self._quick_deaths + 1 if quickly else 1
        if hopeless or self._quick_deaths > len(BACKOFF_SECONDS):
            self.state = "failed"
            log.error("worker core %d is given up; starting a disk of it tries again", self.core)
            return
        self.restarts += 1
        self.state = "waiting"
        seconds = BACKOFF_SECONDS[self._quick_deaths - 1]
        self._respawn = self._reactor.call_later(seconds, self.spawn)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"ended by itself with status {status}"
    return f"was ended by signal {-status} ({signal.strsignal(-status)})"

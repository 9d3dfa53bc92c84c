"""A worker as its controller sees it: spawned or adopted, watched, restarted with back-off."""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from socket import socket
from typing import Any, Final, Literal, TypeAlias

from reactor.control.platform import Bus, Platform, Process
from reactor.control.service import WorkerStatus
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import Timer
from reactor.messages import BOOT_FAILURE, SHORTAGE, Message

START_SECONDS: Final = 60.0  # from exec to hello
ADOPT_SECONDS: Final = 20.0  # for which one may end what it had begun: it drains for up to ten
INQUIRE_SECONDS: Final = 0.1  # until it is connected
INQUIRE_AGAIN_SECONDS: Final = 1.0
SILENCE_SECONDS: Final = 5.0  # without heartbeat a worker is not trusted to read its sockets
HANG_SECONDS: Final = 10.0  # without heartbeat, or any progress of its start, it is killed
AWAKE_LOOKS: Final = 2  # in a row tell that it does not wait for a medium
ABORT_SECONDS: Final = 2.5  # from then on; by SIGABRT (stack dump), at the end by SIGKILL
BACKOFF_SECONDS: Final = (0.0, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 5.0, 5.0, 5.0)
STEADY_SECONDS: Final = 60.0  # a worker that lived so long starts its back-off anew
SHORTAGE_SECONDS: Final = 1.0
HANDOVER_SECONDS: Final = 0.02

State: TypeAlias = Literal["starting", "running", "waiting", "failed"]

log = logger(__name__)


class WorkerProcess:
    """The worker of one core, over all its lives.

    `on_hello` gets what the worker says that it has: when it comes up, and when it was asked again
    because something that it had said got lost. Then, and when it is gone, `on_change` comes.
    `patience` tells for how many seconds who uses its disks waits for one that cannot boot.
    """

    def __init__(
        self,
        platform: Platform,
        bus: Bus,
        core: int,
        patience: Callable[[WorkerProcess], float],
        on_change: Callable[[WorkerProcess], None],
        on_hello: Callable[[WorkerProcess, Message], None],
    ) -> None:
        self.core = core
        self.state: State = "waiting"
        self.failure = ""  # why it was given up
        self.restarts = 0
        self.unknown = True  # it may have disks of which it has yet to say so
        self.statistics: dict[str, int] = {}
        self._platform = platform
        self._reactor = platform.reactor
        self._bus = bus
        self._patience = patience
        self._on_change = on_change
        self._on_hello = on_hello
        self._process: Process | None = None
        self._identity = b""
        self._events = 0  # heard since the last hello
        self._heard_ns = 0
        self._started_ns = 0
        self.spawned = False  # by this controller
        self._progress: int | None = 0  # of its boot
        self._progress_ns = 0  # when it last made any
        self._quick_deaths = 0  # after its hello
        self._boot_deaths = 0  # before it, since the last one
        self._lost_ns = 0  # when the first of these was
        self._short = False  # of memory or descriptors, and that was said
        self._aborted = self._killed = False
        self.is_blocked = False  # a medium that it waits for was reported
        self._awake_looks = 0  # in a row, of those at a silent one
        self._respawn: Timer | None = None
        self._unsent: list[tuple[str, Sequence[socket]]] = []  # what of systemd it has yet to get
        self.is_outdated = False  # it serves on until it is replaced
        self._leaving = False  # it finishes what it does and ends
        self._stopping = False

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
        self.unknown = False
        try:
            process = self._platform.launch(self.core)
        except (OSError, MemoryError) as error:
            if not self._short:
                log.error("worker core %d cannot be started yet: %s", self.core, reason(error))
            self._await_resources()
            self._on_change(self)
            return
        self._begin(process, spawned=True)

    def adopt(self, process: Process) -> None:
        """Take over a living worker, with all that it has, from a controller that died."""
        log.info("worker core %d (pid %d) lives and is taken over", self.core, process.pid)
        self._begin(process, spawned=False)
        self._asked_ns = self._reactor.clock()
        self._inquire_until_heard(process)

    def let_serve(self, process: Process) -> None:
        """Leave a worker that is not as ours are alone, until it is replaced or ends by itself."""
        self.is_outdated = True
        self._begin(process, spawned=False)

    def replace(self) -> None:
        """Have the worker that is not as ours are finish what it does; then start another."""
        log.info(
            "worker core %d (pid %s) is replaced: another version or other options started it",
            *(self.core, self.pid),
        )
        self._leave()

    def retire(self, process: Process) -> None:
        """Have a worker finish what it does and end."""
        log.info("worker core %d (pid %d) ends: the core is not ours now", self.core, process.pid)
        self._stopping = True
        self._begin(process, spawned=False)
        self._leave()

    def _leave(self) -> None:
        self.is_outdated, self._leaving = False, True
        self._started_ns = self._heard_ns = self._reactor.clock()
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    def _begin(self, process: Process, *, spawned: bool) -> None:
        self._process = process
        process.watch(self._on_exit)
        self._identity = f"worker-{self.core}-{process.pid}".encode()
        self._started_ns = self._heard_ns = self._reactor.clock()
        self.spawned = spawned
        self._events = 0
        self._asked_ns = 0  # what it says to older questions, or by itself, does not count
        self._aborted = self._killed = self.is_blocked = False
        self._awake_looks = 0
        self._progress_ns = self._started_ns
        self.state = "starting"

    def owns(self, identity: bytes) -> bool:
        """Whether a message under `identity` is from the living process."""
        return self._process is not None and identity == self._identity

    def heard(self, message: Message) -> bool:
        """Note a sign of life; returns whether the message says something of disks."""
        kind = message["type"]
        other = self.is_outdated or self._leaving or (self.state != "running" and kind != "hello")
        if not other or self._lived() < ADOPT_SECONDS:
            self._heard_ns = self._reactor.clock()
            self.is_blocked = False
            self._awake_looks = 0
        if other:
            return False  # it was said to another controller
        if kind == "hello":
            self._greet(message)
            return False
        if kind == "statistics":
            if message["events"] != self._events:
                log.info("worker core %d is asked what it has: news of it got lost", self.core)
                self._inquire()
            self.statistics = counters(message["reactor"])
        else:
            self._events += 1
        return True

    def _greet(self, message: Message) -> None:
        self._bus.send(self._identity, "welcome", controller=self._platform.pid)
        came = self.state == "starting"
        self._short = False
        if message["id"] < self._asked_ns or not (came or message["id"]):
            return  # it has not heard that it is welcome, or not all that it was told before
        self._events = 0
        self.state = "running"
        if came:
            log.info("worker core %d runs (pid %s)", self.core, self.pid)
            self._boot_deaths = 0
        self._on_hello(self, message)
        self.unknown = self._killed  # what it should not have it has until its end
        self._on_change(self)

    def _inquire(self) -> bool:
        # The id is the time: what it is told later is not in its answer.
        fields = {"id": self._reactor.clock(), "controller": self._platform.pid}
        return self._bus.send(self._identity, "inquire", **fields)

    def _inquire_until_heard(self, process: Process) -> None:
        """Its connection to our bus comes when it comes; what is sent before is refused."""
        if self._process is process and self.state == "starting":
            seconds = INQUIRE_AGAIN_SECONDS if self._inquire() else INQUIRE_SECONDS
            self._reactor.call_later(seconds, lambda: self._inquire_until_heard(process))

    def send(self, kind: str, **fields: Any) -> bool:
        """Send a command; False when it cannot be sent now."""
        return self.state == "running" and self._bus.send(self._identity, kind, **fields)

    def hand_over(self, kind: str, socks: Sequence[socket], **fields: Any) -> None:
        """Send descriptors; raises OSError."""
        self._platform.hand_over(self.core, kind, socks, **fields)

    def hand_listeners(self, listeners: Mapping[str, Sequence[socket]]) -> None:
        """Send systemd's sockets, by name. No disk is opened before it has them."""
        self._unsent = list(listeners.items())
        self._send_listeners(self._process)

    @property
    def takes_disks(self) -> bool:
        """Whether it runs, and has all that a disk may need of it."""
        return self.state == "running" and not self._unsent

    def _send_listeners(self, process: Process | None) -> None:
        while self._unsent and self._process is process:
            name, socks = self._unsent[0]
            try:
                self.hand_over("listener", socks, name=name)
            except BlockingIOError:  # the queue of a socket is short (net.unix.max_dgram_qlen)
                again = partial(self._send_listeners, process)
                self._reactor.call_later(HANDOVER_SECONDS, again)
                return
            except OSError as error:
                log.error("socket %s of systemd is not handed over: %s", name, reason(error))
            del self._unsent[0]

    def look_after(self) -> None:
        """End a worker that does not start or hangs; called every second."""
        process = self._process
        if process is None:
            return
        silence, limit = self._silence(), HANG_SECONDS
        if self._boots:
            silence, limit = self._boot_silence(process)
        if self.is_outdated or silence <= limit:
            return
        if process.waits_for_medium():
            # To kill it would help nobody: it would not even end before the medium answers.
            if not self.is_blocked:
                log.warning(
                    "worker core %d (pid %d) waits for a medium for %.0f s now, and its disks with"
                    " it; dmesg may name the medium",
                    *(self.core, process.pid, silence),
                )
            self.is_blocked = True
            self._awake_looks = 0
            return
        # Who writes to a full page cache is let run now and then, and may look awake by chance.
        self._awake_looks += 1
        if self._awake_looks < AWAKE_LOOKS:
            return
        if silence > limit + ABORT_SECONDS:
            self.kill("it did not even abort" if self._aborted else "it does not end")
        elif not self._aborted and not self._stopping:
            told = "is silent for", silence
            if self._leaving:  # it may well say something
                told = "has not ended after", self._lived()
            stack = "" if self._boots else ", its stack follows"  # it may not be able to yet
            log.error(
                "worker core %d (pid %d) %s %.0f s: aborted%s",
                *(self.core, process.pid, *told, stack),
            )
            self._aborted = True
            process.send_signal(signal.SIGABRT)
            process.send_signal(signal.SIGCONT)  # one that is stopped aborts only then

    def kill(self, why: str) -> None:
        """Kill the process now; its end comes by `on_change`."""
        if self._process is not None and not self._killed:
            log.warning("worker core %d (pid %s) is killed: %s", self.core, self.pid, why)
            self._killed = True  # once: it may take long to end
            self._process.send_signal(signal.SIGKILL)

    def shut_down(self) -> None:
        """Ask it to exit, all its disks being stopped, and do not start it again."""
        if self._stopping:
            return
        self._stopping = True
        if self._respawn is not None:
            self._respawn.cancel()
        if self._process is None:
            self.unknown = False
        elif self.is_outdated:
            self._leave()
        elif not self.send("shutdown", id=0):
            self.kill("it is not connected")

    def revive(self) -> None:
        """Start again a worker that was given up."""
        if self.state == "failed":
            self._quick_deaths = self._boot_deaths = 0
            self.spawn()

    # --- its death ---

    def _lived(self) -> float:
        return (self._reactor.clock() - self._started_ns) / 1e9

    def _silence(self) -> float:
        return (self._reactor.clock() - self._heard_ns) / 1e9

    @property
    def _boots(self) -> bool:
        """Whether it was started, and has yet to say hello."""
        return self.state == "starting" and self.spawned

    def _boot_silence(self, process: Process) -> tuple[float, float]:
        """Return for how many seconds it has said nothing, or done nothing, and the limit."""
        now, progress = self._reactor.clock(), process.progress()
        if not self._aborted and (progress is None or progress != self._progress):
            self._progress, self._progress_ns = progress, now
        idle = (now - self._progress_ns) / 1e9
        if idle > HANG_SECONDS:
            return idle, HANG_SECONDS
        return self._silence(), START_SECONDS

    def _on_exit(self, status: int | None) -> None:
        self._process = None
        self.unknown = False
        self.statistics = {}
        if self._stopping:
            self.state = "waiting"
        elif self.is_outdated or self._leaving:
            self.is_outdated = self._leaving = False
            self.spawn()
        else:
            log.error("worker core %d %s", self.core, _how_it_ended(status))
            if status == SHORTAGE:
                self._await_resources()
                self._on_change(self)
                return
            self._count_death()
            self._plan_respawn(cannot_start=status == BOOT_FAILURE)
        self._on_change(self)

    def _await_resources(self) -> None:
        """Try again for as long as it takes: nothing is wrong with the worker."""
        self._short = True
        self.state = "waiting"
        self._respawn = self._reactor.call_later(SHORTAGE_SECONDS, self.spawn)

    def _count_death(self) -> None:
        if not self._boots:
            quickly = self._lived() < STEADY_SECONDS
            self._quick_deaths = self._quick_deaths + 1 if quickly else 1
            return
        if not self._boot_deaths:
            self._lost_ns = self._reactor.clock()
        self._boot_deaths += 1

    def _is_given_up(self, *, cannot_start: bool) -> bool:
        """Whether it is not started again.

        One that cannot even boot may lack memory and be unable to say so, or what it lacks may
        come back; what it serves has no fault then, and is not taken from who would wait for it.
        """
        most = len(BACKOFF_SECONDS)
        lost = (self._reactor.clock() - self._lost_ns) / 1e9
        tried = cannot_start or self._quick_deaths + self._boot_deaths > most
        return self._quick_deaths > most or (tried and lost >= self._patience(self))

    def _plan_respawn(self, *, cannot_start: bool) -> None:
        if self._is_given_up(cannot_start=cannot_start):
            self.state = "failed"
            why = "cannot start; the log says why" if cannot_start else "keeps dying"
            self.failure = f"the worker of core {self.core} {why}"
            log.error("worker core %d is given up; starting a disk of it tries again", self.core)
            return
        self.restarts += 1
        self.state = "waiting"
        deaths = min(self._quick_deaths + self._boot_deaths, len(BACKOFF_SECONDS))
        self._respawn = self._reactor.call_later(BACKOFF_SECONDS[deaths - 1], self.spawn)


def counters(given: dict[Any, Any]) -> dict[str, int]:
    """Return what of a message's map are counters."""
    return {
        name: count
        for name, count in given.items()
        if isinstance(name, str) and isinstance(count, int)
    }


def _how_it_ended(status: int | None) -> str:
    if status is None:
        return "has ended; dmesg may say why"
    if status >= 0:
        return f"ended by itself with status {status}"
    return f"was ended by signal {-status} ({signal.strsignal(-status)})"

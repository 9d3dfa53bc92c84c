"""The workers that serve a disk: one, or several that share it."""

from __future__ import annotations

import errno
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from reactor.control.errand import Errand
from reactor.control.share import Share
from reactor.control.workers import WorkerProcess
from reactor.errors import DeviceError, ReactorError, reason
from reactor.log import logger
from reactor.messages import Message
from reactor.spec import Address, DiskSpec

OPEN_SECONDS: Final = 60.0
REST_SECONDS: Final = 60.0  # from one try of who lacks what it takes to open the disk to the next
TURN_SECONDS: Final = 15.0  # ... where nobody has it open: in which others have their turn
REMOVE_SECONDS: Final = 15.0
DRAIN_SECONDS: Final = 10.0
LET_GO_SECONDS: Final = 15.0  # until a worker has drained a disk and closed it
MEDIUM_SECONDS: Final = 30.0  # more, for what a slow medium has of a disk that goes alone

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Geometry:
    """What the kernel is told of a disk. Sizes in bytes, flags of the transmission phase."""

    size: int = 0
    block_size: int = 0
    flags: int = 0


class Shares:
    """The shares of a disk, that of its owner first. Methods begin one thing on its errand.

    Who takes part is everyone but those that were given up. One of them leads: it serves the
    listeners, gives clients to the others, and is the one that changes the storage.
    """

    def __init__(
        self,
        errand: Errand,
        clock: Callable[[], int],
        spec: DiskSpec,
        shares: Sequence[Share],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self.listen = spec.listen  # where its leader should
        self._earlier = spec.listen  # ... when this controller began
        self.geometry = Geometry()
        self.has_storage = self._had_storage = False  # a worker has opened the disk, or may have
        self._is_made = False  # it was open before that
        self._errand = errand
        self._clock = clock
        self._disk = spec.name
        self._all = shares
        self._patience = OPEN_SECONDS  # with a worker that lacks something
        self._on_failed = on_failed
        self._on_refused = on_failed  # the leader's resize

    # --- what they are ---

    def of(self, worker: WorkerProcess) -> Share | None:
        """Return what `worker` has of the disk, None when it is none of the disk's workers."""
        return next((share for share in self._all if share.worker is worker), None)

    @property
    def cores(self) -> tuple[int, ...]:
        """The cores of those that take part, the leader's first."""
        leader = self._leader()
        cores = (share.worker.core for share in self._taking_part() if share is not leader)
        return (leader.worker.core, *cores)

    @property
    def addresses(self) -> set[Address]:
        """Where a worker listens for its clients, or may."""
        earlier = self._earlier if self.unknown else ()
        return {*earlier, *(address for share in self._all for address in share.listen)}

    @property
    def opened(self) -> list[Share]:
        """Those that have the disk open."""
        return [share for share in self._all if share.opened]

    @property
    def unclosed(self) -> list[Share]:
        """Those that have the disk open, or may."""
        return [share for share in self._all if share.opened or share.opening]

    @property
    def closed(self) -> list[Share]:
        """Those that have yet to open the disk, or to lead as they should, or no longer."""
        members = list(self.cores[1:])
        leader = self._leader()
        return [
            share
            for share in self._taking_part()
            if not share.opened
            or share.listen != (self.listen if share is leader else ())
            # Who is silent serves as it did, as far as it can; it is told when it answers.
            or (
                (share.opening or share.members != (members if share is leader else None))
                and not share.worker.is_silent
            )
        ]

    @property
    def common_geometry(self) -> Geometry:
        """The geometry with no more blocks than everyone has, should a resize be half done."""
        sizes = (share.size for share in self.opened)
        return replace(self.geometry, size=min(sizes, default=self.geometry.size))

    @property
    def disagree(self) -> bool:
        """Whether somebody shows another size than the disk has."""
        return any(share.size != self.geometry.size for share in self.opened)

    @property
    def _shared(self) -> bool:
        """Whether several workers have it open."""
        return len(self._all) > 1

    def are_of(self, report: Mapping[str, Any], spec: DiskSpec) -> bool:
        """Whether a worker has it open as `spec` says, and lets others.

        But for its size and addresses, which can be changed.
        """
        served = DiskSpec.from_message(report["spec"])
        wanted = replace(spec, device=None, listen=served.listen).with_size(0)
        return served.with_size(0) == wanted and (report["shared"] or not self._shared)

    @property
    def refusing(self) -> bool:
        """Whether some worker refuses I/O."""
        return any(share.refusing for share in self._all)

    @property
    def unknown(self) -> bool:
        """Whether some worker may have the disk open without our knowing."""
        return any(share.worker.unknown for share in self._all)

    @property
    def hopeless(self) -> bool:
        """Whether no worker will ever be there."""
        return all(share.worker.state == "failed" for share in self._all)

    def shortcoming(self) -> str:
        """Return what is missing of those that should have the disk open, if anything."""
        missing = [share for share in self._all if not share.opened]
        lacks = next((share for share in missing if share.lack), None)
        if missing and self.opened:
            cores = ", ".join(str(share.worker.core) for share in missing)
            for_good = lacks is not None and lacks.given_up and not lacks.rests
            served = f"served without core {cores}{' until it is started again' * bool(for_good)}"
            return f"{served}: {lacks.lack}" if lacks is not None else served
        if lacks is not None:
            return lacks.lack
        unheard = next((share.unheard for share in self._all if share.unheard), "")
        return f"not served everywhere: {unheard}" if unheard else ""

    def statistics(self) -> dict[str, int]:
        """Return the sums of all counters."""
        total: Counter[str] = Counter()
        for share in self._all:
            total.update(share.statistics)
        return dict(total)

    def forgive(self) -> None:
        """Let everyone take part again."""
        for share in self._all:
            share.take_back()
            share.waiting.end()

    # --- what is done ---

    def give_up_failed(self) -> None:
        """Do without the workers that keep dying."""
        for share in self._taking_part():
            if share.worker.state == "failed":
                self._give_up(share, ReactorError(share.worker.failure))

    def open_next(
        self, spec: DiskSpec, least: int, within: float = OPEN_SECONDS, *, idle: bool = False
    ) -> None:
        """Have the disk opened by the first that has yet to and whose worker runs, if any.

        `least`: bytes that its storage must have; 0: it may be made. `within` so many seconds.
        `idle`: nothing else is to be done, for which one that lacked something is in the way.
        """
        if idle or not self.opened:
            self._take_back_next()
        core, *members = self.cores
        running = [
            share
            for share in self.closed
            if share.worker.takes_disks and not (share.opened and share.worker.is_silent)
        ]
        if not running:
            return
        # Who is to lead waits until the one that did listens no more. Else those that hang wait.
        share = min(
            running,
            key=lambda share: (
                share.opened and share.worker.core == core,
                not share.worker.healthy,
                share.tried_ns,
            ),
        )
        leads = share.worker.core == core
        # While others serve nobody waits for it: what it lacks may take as long as I/O could wait.
        self._patience = max(within, spec.dead_timeout) if self.opened else within
        share.tried_ns, share.opening = self._clock(), True
        self._had_storage, self.has_storage = self.has_storage, True  # should it never answer
        self._is_made = bool(least)
        listen = self.listen if leads else ()
        share.unheard = ""  # it says so anew
        # What the worker needs not know changes without it.
        spec = replace(spec, device=None, listen=listen)

        def started(_worker: WorkerProcess, message: Message) -> None:
            self._learn(message)
            share.opening, share.opened = False, True
            share.waiting.end()
            share.size = message["size"]
            share.members = members if leads else None
            share.listen = listen

        self._ask(
            [share],
            "start",
            "started",
            within,
            started,
            spec=spec.to_message(),
            shared=self._shared,
            leads=leads,
            members=members if leads else [],
            least=least,
        )

    def resize(
        self, size: int, then: Callable[[], None], on_refused: Callable[[Exception], None]
    ) -> None:
        """Change the disk's size, one after the other, so that none has blocks that are not there.

        If one has lost the disk meanwhile nothing comes: it opens it first, and all begins anew.
        On a failure `on_refused` comes instead of `then`; the size is what it was before.
        """
        late = next((share for share in self._all if share.opening and not share.opened), None)
        if late is not None and size < self.geometry.size:
            why = f"worker core {late.worker.core} was told its size of before, and may yet open it"
            on_refused(OSError(errno.EBUSY, why))
            return
        self._on_refused = on_refused
        leader = self._leader()
        followers = [share for share in self._taking_part() if share is not leader]
        grows = size >= self.geometry.size
        self._resize([leader, *followers] if grows else [*followers, leader], size, then)

    def _resize(self, shares: Sequence[Share], size: int, then: Callable[[], None]) -> None:
        if not shares:
            then()
            return
        share, *others = shares
        if not share.opened:
            return
        leads = not self._follows(share)

        def resized(_worker: WorkerProcess, message: Message) -> None:
            share.size = message["size"]
            if leads:  # only then is it so: followers show what they are told
                self.geometry = replace(self.geometry, size=share.size)
            self._resize(others, size, then)

        fields = {"disk": self._disk, "size": size, "follow": not leads}
        self._ask([share], "resize", "resized", OPEN_SECONDS, resized, **fields)

    def agree(self) -> None:
        """Have the disk's size shown by one that shows another, if any.

        A resize failed half-way, or the storage had changed when a worker opened it anew.
        """
        size = self.geometry.size
        share = next((s for s in self.opened if s.size != size and s.worker.healthy), None)
        if share is None:
            return

        self._on_refused = self._on_failed

        def agreed(_worker: WorkerProcess, _message: Message) -> None:
            share.size = size

        fields = {"disk": self._disk, "size": size, "follow": True}
        self._ask([share], "resize", "resized", OPEN_SECONDS, agreed, **fields)

    def refuse(self) -> bool:
        """Have all I/O refused from now on; False when that is so, or nobody can be asked."""
        shares = [s for s in self.opened if not s.refusing and s.worker.healthy]
        if shares:
            self._ask(shares, "remove", "removed", REMOVE_SECONDS, _take, disk=self._disk)
        return bool(shares)

    def stop(self, seconds: float) -> None:
        """Have the disk drained and closed; after `seconds` its workers are killed."""
        self._stop(self.unclosed, seconds)

    def kill_silent(self, seconds: float) -> None:
        """Wait for `seconds` at the most, and end the workers that are silent meanwhile."""
        self._errand.hurry(seconds)
        for share in self._all:
            if self._errand.needs(share.worker) and share.worker.is_silent:
                share.worker.kill(f"disk {self._disk} must stop and it does not answer")

    def pass_silent(self) -> None:
        """Wait no longer for the answer of a worker that is silent while another could serve.

        One that is opening the disk is done without until it answers, one that has it open only
        not told of the others; it is ended if something else is awaited, and another worker waits.
        """
        waits = any(share.worker.healthy for share in self.closed)
        for share in self._taking_part():
            if not (self._errand.needs(share.worker) and share.worker.is_silent):
                continue
            if self._errand.awaits("started"):
                if share.opened or any(map(self._could_serve, self._all)):
                    self._errand.pass_by(share.worker)
            elif share.opened and waits:
                why = f"disk {self._disk} waits for its answer, and another worker for the disk"
                share.worker.kill(why)

    def answered(self, share: Share, message: Message) -> None:
        """Take what may be the answer to a command."""
        if message["type"] == "unheard":
            share.unheard = message["reason"]
            return
        command = self._errand.answered(share.worker, message)
        if command is None:
            if message["type"] in ("started", "failed"):
                share.end_silence()  # it goes on: now it is told again
            return
        error = OSError(message["errno"], message["reason"])
        if command in ("stop", "release") or (command == "resize" and self._follows(share)):
            # Whatever it still does to the disk must end before the disk can go on without it.
            share.worker.kill(f"it cannot {command} disk {self._disk}: {reason(error)}")
        elif command == "start" and share.opened and not self._follows(share):
            share.opening, share.listen, share.unheard = False, self.listen, reason(error)
        elif command == "start":
            self._not_opened(share, error)
        elif command == "resize":
            self._on_refused(error)
        else:
            self._on_failed(error)

    def found(self, share: Share, report: Mapping[str, Any]) -> None:
        """Take over what a worker says that it has of the disk."""
        self._learn(report)
        if report["leads"]:  # it is the one that changes the storage
            self.geometry = replace(self.geometry, size=report["size"])
        share.found(report)

    def removed(self, share: Share) -> bool:
        """Note that a worker refuses I/O; returns whether it was asked to."""
        share.refusing = True
        awaited = self._errand.awaits("removed")
        if awaited:
            self._errand.excuse(share.worker)
        return awaited

    # --- the parts ---

    def _learn(self, told: Mapping[str, Any]) -> None:
        """Take what the first that has the disk says of it."""
        self.has_storage = True
        if not self.opened:
            size, block_size, flags = (told[key] for key in ("size", "block_size", "flags"))
            self.geometry = Geometry(size, block_size, flags)

    @property
    def _resting(self) -> list[Share]:
        """Those that are done without for now."""
        return [share for share in self._all if share.rests]

    def _take_back_next(self) -> None:
        """Have the next one take part again that has had its rest."""
        since = self._clock() - int((REST_SECONDS if self.opened else TURN_SECONDS) * 1e9)
        for share in sorted(self._resting, key=lambda share: share.tried_ns):
            if share.tried_ns <= since and share.worker.takes_disks and share.worker.healthy:
                share.take_back()
                return

    def _taking_part(self) -> list[Share]:
        return [share for share in self._all if not share.given_up]

    def _could_serve(self, share: Share) -> bool:
        """Whether it may soon; of who rests that is so if the disk outlasts another failure."""
        takes_part = not share.given_up or (share.rests and self._is_made)
        return share.worker.healthy and takes_part

    def _find_others(self, share: Share) -> bool:
        """Return whether anyone but `share` takes part; if not, have those that rest do so again.

        But those that answer nothing only if there are no others.
        """
        if self._taking_part() == [share]:
            for resting in [s for s in self._resting if s.worker.healthy] or self._resting:
                resting.take_back()
        return self._taking_part() != [share]

    def _leader(self) -> Share:
        """Return the first that takes part; while it opens the disk, the one that leads now."""
        shares = self._taking_part() or self._all
        if shares[0].opened:
            return shares[0]
        return next((share for share in shares if share.members is not None), shares[0])

    def _not_opened(self, share: Share, error: Exception) -> None:
        share.opening = False
        rests = share.waiting.bears(error, self._patience)
        if not self.opened:
            self.has_storage = self._had_storage
        if self.opened or rests:
            self._give_up(share, error, rests=rests)
        else:
            self._on_failed(error)

    def _follows(self, share: Share) -> bool:
        return share is not self._leader()

    def _give_up(self, share: Share, error: Exception, *, rests: bool = False) -> None:
        """Do without a worker, if there is another one; for a while, if it `rests`."""
        if self._taking_part() == [share]:
            others = self._find_others(share)
            waits = not self._is_made and any(other.opening for other in self._all)
            if not others or (rests and not waits):  # then all are tried anew, if that may be
                self._on_failed(error)
                return
        share.given_up, share.rests = reason(error), rests
        log.warning(
            "disk %s does without core %d %s: %s",
            *(self._disk, share.worker.core),
            "for now" if rests else "until it is started again",
            share.given_up,
        )

    def _stop(self, shares: Sequence[Share], seconds: float = LET_GO_SECONDS) -> None:
        def stopped(worker: WorkerProcess, _message: Message) -> None:
            share = self.of(worker)
            assert share is not None
            share.close()

        fields = {"disk": self._disk, "seconds": DRAIN_SECONDS}
        self._ask(shares, "stop", "stopped", seconds, stopped, **fields)

    def _ask(
        self,
        shares: Sequence[Share],
        kind: str,
        answer: str,
        within: float,
        take: Callable[[WorkerProcess, Message], None],
        **fields: Any,
    ) -> None:
        workers = [share.worker for share in shares]
        late = partial(self._unanswered, kind)
        self._errand.ask(workers, kind, answer, within, take, late, **fields)

    def _unanswered(self, kind: str, worker: WorkerProcess, why: str) -> None:
        share = self.of(worker)
        assert share is not None
        if kind in ("stop", "remove", "resize"):
            # Whatever it still does to the disk must end before the disk can go on without it.
            worker.kill(why)
            if not share.opened:
                share.close()  # killed, it opens nothing any more
        elif share.opened:  # it serves on, but for its clients; it is told again
            log.warning("disk %s: %s", self._disk, why)
        elif share.worker.is_silent and self._find_others(share):
            self._give_up(share, DeviceError(errno.ETIMEDOUT, why), rests=True)
        elif self.opened:
            self._give_up(share, DeviceError(errno.ETIMEDOUT, why))
            self._stop([share])  # it may yet open it
        else:
            self._on_failed(DeviceError(errno.ETIMEDOUT, why))


def _take(_worker: WorkerProcess, _message: Message) -> None:
    """Take an answer that says nothing else."""

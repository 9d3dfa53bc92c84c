"""One disk as the controller runs it: what is, what should be, and the next step between them.

`step` is level-triggered: called after every event and every second, it looks at the state and
does one thing, or nothing while the answer to the last one is awaited. Rising: open on each worker,
attach the kernel device (or give it a new socket), probe it. Falling, in the one order: stop
intake (the device), drain, release on the workers, discard what is left.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Final

from reactor.attach.device import Device
from reactor.control.answers import Answers
from reactor.control.errand import Errand
from reactor.control.host import Host
from reactor.control.leftovers import discard
from reactor.control.link import DeviceLink
from reactor.control.resize import Resize
from reactor.control.saved import Desired, Wish
from reactor.control.service import DiskState, DiskStatus, Done
from reactor.control.share import Share
from reactor.control.shares import OPEN_SECONDS, Shares
from reactor.control.waiting import Waiting
from reactor.control.workers import WorkerProcess
from reactor.errors import ReactorError, is_shortage, reason
from reactor.log import logger
from reactor.messages import Message
from reactor.spec import Address, DiskSpec

SHORTAGE_SECONDS: Final = 1.0

log = logger(__name__)


class DiskControl:
    """A disk and what is done to make it what it should be."""

    def __init__(
        self,
        host: Host,
        wish: Wish,
        workers: Mapping[int, WorkerProcess],  # by core
        *,
        known: bool,  # it was open before: to an earlier controller, or under another config
    ) -> None:
        self.spec = spec = wish.spec
        self.placement = placement = wish.placement
        self.desired: Desired = wish.desired
        self.forced = False  # stop without writing back
        self.due = wish.due  # bytes that the config asks for, if it does not have as many yet
        self.obstacle = ""  # why it is not as the config says
        self._made = wish.made  # 0: its storage may be made anew, should it be gone
        self.failure: Exception | None = None
        self.settled = False
        self._host = host
        self._former = {core: workers.get(core) for core in wish.former}
        self._hot, self._known = wish.hot, known
        self._saved: Wish | None = None  # what was last kept
        if wish.hot and wish.desired == "online":
            self.failure = ReactorError("its storage was removed")
        self._again_online = False  # wanted online while it was still being removed
        self._errand = Errand(host.platform, self.step)
        clock = host.platform.reactor.clock
        shares = {core: Share(workers[core], clock) for core in placement.cores}
        homes = [shares[core] for core in placement.connections]
        self._shares = Shares(self._errand, clock, spec, list(shares.values()), self._on_failed)
        self._link = DeviceLink(host.platform, self._errand, homes, self._on_link_failed)
        self._waiting = Waiting(clock)
        self._answers = Answers(spec.name)
        self._left: Exception | None = None  # why what it kept could not be removed
        self._attaching: Callable[[str | Exception], None] | None = None
        self._resize: Resize | None = None
        self._grows = bool(wish.due)  # as soon as it can

    # --- what front ends ask ---

    def want(self, desired: Desired, done: Done | None = None, *, hot: bool = False) -> None:
        """Change what the disk should be; `done` comes when it is, or has failed."""
        if desired == "online" and self._shares.refusing:
            self._again_online = True  # first it must be let go
            self._again(done, desired)
            return
        if desired == "online":
            self.failure, self._hot, self._grows = None, False, bool(self.due)
            self._link.forgive()
            self._shares.forgive()
        if desired == "stopped" and self.settled and not self._hot:
            self.failure = None  # nobody wants online any more what could not be
        self._again_online = False
        if self.desired != "gone":
            self.desired = desired
        self._hot = self._hot or hot
        self._again(done, desired)

    def change(self, spec: DiskSpec, *, resized: bool) -> None:
        """Become `spec`, in which only device, listeners and, if `resized`, size differ."""
        self._answer_attach(OSError(errno.ECANCELED, "the config of the disk has changed"))
        if resized:
            size, has = spec.options.get("size", 0), self.spec.options.get("size", 0)
            if size < has and not self.is_made:
                self.spec = self.spec.with_size(size)
            elif size < has:
                log.warning("disk %s keeps its %d bytes: only `resize` cuts", self.spec.name, has)
            # A resize that is under way may leave less.
            self.due = size if size > min(has, self._resize.size if self._resize else has) else 0
        self.spec = replace(self.spec, device=spec.device, listen=spec.listen)
        self._shares.listen = spec.listen
        self._host.listens(self, spec.listen)
        self.want("stopped" if self.desired == "stopped" else "online")

    def attach(self, device: str, done: Callable[[str | Exception], None]) -> None:
        """Attach to `device`, if there is no `attach_refusal`."""
        self._attaching = done
        self._link.forgive()
        self.spec = self.spec.with_device(device)
        self._again(None)

    def _report_resize(self, size: int, error: Exception | None) -> None:
        # If only the device has it not yet, that is told as soon as it can be.
        if error is not None and self.spec.options.get("size", 0) != size:
            log.error("disk %s keeps its size: %s", self.spec.name, reason(error))

    def _grow(self) -> None:
        self._grows = False
        if self.due > self._shares.geometry.size:
            self.resize(self.due, partial(self._report_resize, self.due))
        else:
            self.due = 0
            self.step()  # that is saved first

    def detach(self, done: Done) -> None:
        """Give up the device; the disk stays."""
        self._answer_attach(OSError(errno.ECANCELED, "the device was detached meanwhile"))
        self.spec = self.spec.with_device(None)
        self._again(done)

    def resize(self, size: int, done: Done) -> None:
        """Change the size of the disk and of its device; raises OSError EBUSY if not now."""
        now = self.state if self._resize is None else "being resized"
        if now != "online":
            raise OSError(errno.EBUSY, f"disk {self.spec.name} is {now}")
        before, shown = self.spec.options.get("size", size), self._shares.geometry.size
        self._resize = Resize(size, done, before, shown, self.due)
        self._again(None)

    # --- what it is ---

    @property
    def has_storage(self) -> bool:
        """Whether what it keeps outside its workers can be its own: it was open once."""
        return self._known or self._shares.has_storage

    @property
    def wish(self) -> Wish:
        """What it should be."""
        former = tuple(core for core, w in self._former.items() if not w or w.unknown)
        rest = self.desired, self._hot, former, self._made, self._attaching is not None, self.due
        return Wish(self.spec, self.placement, *rest)

    @property
    def path(self) -> str | None:
        """The device really attached."""
        return self._link.path

    @property
    def is_made(self) -> bool:
        """Whether the storage is its own: it was open once."""
        return bool(self._made or self._shares.opened)

    @property
    def addresses(self) -> set[Address]:
        """Where its workers listen."""
        return self._shares.addresses

    @property
    def rising(self) -> bool:
        """Whether it is to be online, and can be."""
        return self.desired == "online" and self.failure is None

    @property
    def state(self) -> DiskState:
        """The word for what the disk is now."""
        if self.rising:
            up = not self._shares.closed and (self.spec.device is None or self._link.probed)
            return "online" if up and self._link.serving else "starting"
        if not self.settled:
            return "stopping"
        if self.failure is not None:
            return "removed" if self._hot else "failed"
        return "stopped"

    def status(self) -> DiskStatus:
        """Return what front ends show."""
        return DiskStatus(
            spec=self.spec,
            state=self.state,
            reason=self._reason(),
            cores=self._shares.cores,
            **asdict(self._shares.geometry),
            device=self.path,
            statistics=self._shares.statistics(),
        )

    def _reason(self) -> str:
        if self.failure is not None:
            return reason(self.failure)
        former = ", ".join(str(worker.core) for worker in self._awaited_former())
        if former and self.state != "online":
            return f"waits for the end of the worker of core {former}, which may have it open"
        if self.rising:
            is_due = self.due > self._shares.geometry.size
            grows = f"has yet to grow to {self.due} bytes" if is_due else ""
            causes = self._shares.shortcoming(), self._waiting.reason, self.obstacle, grows
            return "; ".join(dict.fromkeys(filter(None, causes)))
        waits = self._is_unwritten() and not self._shares.opened
        return f"waits for a worker to write back {self.path}" if waits else ""

    # --- what happens ---

    def share(self, worker: WorkerProcess) -> Share | None:
        """Return what `worker` has of the disk, None when it is none of the disk's workers."""
        return self._shares.of(worker)

    def heard(self, share: Share, message: Message) -> None:
        """Take an answer or event of a worker."""
        kind = message["type"]
        if kind == "removed":
            self._on_removed(share, message["reason"])
        elif kind == "disconnected":
            self._link.connection_lost(message["generation"])
        else:
            self._shares.answered(share, message)
            if kind == "started":
                self._waiting.end()  # of what it may lack later this says nothing
        self.step()

    def worker_lost(self, share: Share) -> None:
        """Note that a worker is gone, with its channel and its ends of the sockets."""
        share.close()
        self.settled = self.settled and not self.rising
        self._link.worker_lost(share)
        self._errand.worker_lost(share.worker)
        self.step()

    def adopt(self, device: Device) -> None:
        """Take over a device that the kernel still holds for the disk."""
        log.info("disk %s: the kernel still holds %s", self.spec.name, device.path)
        self._link.adopt(device, self.spec)
        self._made, self._known = self._made or 1, True  # also when the state was lost

    def found(self, share: Share, report: Mapping[str, Any] | None, asked_ns: int) -> bool:
        """Note what a worker had of the disk when it was asked; False: what it must not have."""
        share.close(told=self._errand.forget_before(asked_ns, share.worker))
        if report is None:
            self._link.found(share, (), asked_ns)
            return True
        if not self._shares.are_of(report, self.spec):
            return False
        self._shares.found(share, report)
        self._host.listens(self, share.listen)
        self._link.found(share, report["connections"], asked_ns)
        if share.refusing:
            self._on_removed(share, report["reason"])
        elif report["leads"] and self._resize is None:
            self._find_size(report["size"])
        self.settled = False
        return True

    def _find_size(self, size: int) -> None:
        """Go on with a resize that a dead controller began; what it did not cut is not cut."""
        wanted = self.spec.options.get("size", size)
        if wanted > size:
            self.due, self._grows = self.due or wanted, True
        self.spec = self.spec.with_size(size)

    def step(self) -> None:
        """Do the next thing, if nothing is awaited."""
        if self._host.holding() or (self.desired == "gone" and self.settled):
            return  # what has its name and its memory now is another disk
        self._learn_made()
        if self._saved != self.wish:
            self.settled = False
            self._host.save_soon(self._go_on)
            return
        if self._shares.unknown or self._awaited_former():
            return
        if self._errand.busy() and self.rising:
            self._shares.pass_silent()
        elif self._errand.busy():
            self._shares.kill_silent(self._host.let_go_seconds())
        if self._errand.busy():
            return
        hindered = self._is_hindered()
        if not self.rising:
            self._fall()
        elif not hindered:
            self._rise()
        if self._errand.busy():
            self.settled = False

    def _is_hindered(self) -> bool:
        """Whether something must happen before it is opened; fails it when that never will."""
        if not self.rising or self._shares.opened:
            return False
        try:
            return self._waiting.holds(self._host.hindrance(self), briefly=False)
        except OSError as error:
            self._on_failed(error)
            return True

    def _awaited_former(self) -> list[WorkerProcess]:
        return [w for w in self._former.values() if w is not None and w.unknown]

    def _learn_made(self) -> None:
        """Note what its storage has, and all show; it is saved before anyone relies on it."""
        if self.rising and self._resize is None and self._shares.opened:
            self._made = self._shares.common_geometry.size or self._made
            if not (self._shares.closed or self._shares.disagree):
                self.spec = self.spec.with_size(self._shares.geometry.size)

    def _go_on(self) -> None:
        self._saved = self.wish
        self.step()

    # --- rising ---

    def _rise(self) -> None:
        link, shares, device = self._link, self._shares, self._link.device
        resize = self._resize if self._resize and not self._resize.refusal else None
        astray = device is not None and self.spec.device not in ("auto", device.path)
        if not astray:
            link.stay()
        shares.give_up_failed()
        shares.open_next(self.spec, self._made, self._patience, idle=self.settled)
        if self._errand.busy() or self.failure is not None:
            return
        if resize is None:
            shares.agree()
            if self._errand.busy():
                link.fitted = False  # the kernel may believe in fewer blocks
                return
        if device is None:
            self._attach()
        elif astray:
            self._let_go(device)
            return
        else:
            link.mend(device, resize.geometry(shares) if resize else shares.common_geometry)
        if self._errand.busy() or self.state != "online":
            return
        if resize is not None:
            self._resize_step(resize)
        elif not (self._resize and shares.disagree):
            self._settle()

    def _attach(self) -> None:
        own = self.spec.device if self._attaching is None else None  # who asks is told at once
        why = self._host.attach_hindrance(self) or self._link.hindrance(own)
        waits = self._waiting.holds(why, briefly=self.spec.device == "auto")
        if self.spec.device and not self._shares.closed and not waits:
            failed = partial(self._on_attach_failed, self.spec.device, self._attaching)
            self._link.attach(self.spec, self._shares.common_geometry, failed)

    def _resize_step(self, resize: Resize) -> None:
        def keep(then: Callable[[], None]) -> None:
            if not self.rising:  # nor may it be saved any more
                refused(self.failure or OSError(errno.ECANCELED, "the disk is stopped"))
                return
            self.spec = self.spec.with_size(resize.size)
            self._made = min(self._made, resize.size)
            self._saved = self.wish
            self._host.save()
            then()

        def refused(error: Exception) -> None:
            self.spec = self.spec.with_size(resize.before)
            self._resize, self._link.fitted = replace(resize, refusal=error), False

        def finish(error: Exception | None) -> None:
            self._resize = None
            self._made = resize.size if error is None else self._made
            self._link.fitted &= error is None  # else the kernel may have another size
            self.due = 0 if self.due == resize.overrules else self.due
            resize.done(error)

        resize.begin(self._link, self._shares, keep=keep, refused=refused, finish=finish)

    # --- falling ---

    def _fall(self) -> None:
        device, keeps = self._link.device, self._host.keeps()
        stays = keeps or (self.desired == "online" and not self._hot and self._host.may_fail())
        if self._hot and self._shares.refuse():
            return
        if device is not None and not (stays and device.can_reconnect):
            self._let_go(device)
        elif self._shares.unclosed:
            self._shares.stop(self._host.let_go_seconds())
        else:
            keep_memory = keeps or self._host.is_succeeded(self)
            discards = self.desired == "gone" and not keep_memory and self.has_storage
            if self._made and (discards or self.desired == "stopped"):
                self._made = 0  # by a stop: a way out, should its storage be gone
                self.step()  # that is saved first
                return
            if discards:
                self._left = discard(self._host.platform, self.spec)
            self._settle()

    def _writes_back(self) -> bool:
        # What is written back to a disk that was removed or failed would only fail again.
        return not self._hot and self.failure is None and not self.forced

    def _is_unwritten(self) -> bool:
        lost = self._link.device is not None and not self._link.usable
        return lost and not self._link.flushed and self._writes_back()

    def _let_go(self, device: Device) -> None:
        """Do the next thing on the way to no device, with its cache written if that can be."""
        link = self._link
        if not self._is_unwritten() or not device.can_reconnect or self._shares.hopeless:
            link.release(device, self._host.let_go_seconds(), write_back=self._writes_back())
        elif not link.reconnect(device):
            self._shares.open_next(self.spec, self._made)

    # --- waiting and answering ---

    def _on_failed(self, error: Exception) -> None:
        # Who uses the disk is to wait; else its device fails.
        used = self.path or (self._made and (is_shortage(error) or not self._shares.opened))
        if used and self._waiting.bears(error, self._patience):
            log.warning("disk %s waits: %s", self.spec.name, reason(error))
            self._errand.pause(SHORTAGE_SECONDS)
        elif self.failure is None:
            log.error("disk %s failed: %s", self.spec.name, reason(error))
            self.failure = error

    @property
    def _patience(self) -> float:
        """Seconds for which its storage may be out of order: who uses a device waits so long."""
        return max(OPEN_SECONDS, self.spec.dead_timeout) if self.path else OPEN_SECONDS

    def _on_link_failed(self, error: Exception) -> None:
        """Fail the disk; but a device that was asked for at run time fails alone."""
        if self._attaching is None:
            self._on_failed(error)
        else:
            self._answer_attach(error)

    def _on_attach_failed(self, device: str, attaching: object, error: Exception) -> None:
        if (self.spec.device, self._attaching) == (device, attaching):  # else nobody asks any more
            self._on_link_failed(error)

    def _answer_attach(self, result: str | Exception) -> None:
        """Answer who asked for a device at run time, if that is open; without one, forget it."""
        attaching, self._attaching = self._attaching, None
        if attaching is not None:
            if isinstance(result, Exception):
                self.spec = self.spec.with_device(None)
            attaching(result)

    def _on_removed(self, share: Share, why: str) -> None:
        self._hot = True
        if not self._shares.removed(share) and self.failure is None and self.desired == "online":
            self.failure = ReactorError(f"its storage was removed: {why}")

    def _settle(self) -> None:
        if self._again_online:
            self._again_online = False
            self.want("online")
            return
        failure = self.failure if self.desired == "online" else None
        resize, self._resize = self._resize, None
        if resize is not None:
            resize.done(resize.refusal or failure or OSError(errno.ENODEV, "the disk is stopped"))
        if self._grows and self.rising:
            self._grow()
            return
        self._waiting.end()
        if self.settled:
            return
        self.settled = True
        self._answer_attach(failure or self.path or OSError(errno.ENODEV, "the disk is stopped"))
        answers = self._answers.take(self.desired, failure, self._left)
        self._host.on_settled(self)
        for done, error in answers:  # last: whoever hears of it may want something else at once
            done(error)

    def _again(self, done: Done | None, wanted: Desired | None = None) -> None:
        self.settled = False
        if done is not None:
            self._answers.owe(done, wanted)
        self.step()

"""The controller's logic: the desired disks, and the workers that should serve them."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from socket import socket
from typing import Final

from backends import registry
from reactor.control.configured import Configured
from reactor.control.disk import DiskControl
from reactor.control.holders import attach_refusal, check_new, holder, patience
from reactor.control.host import Host
from reactor.control.leftovers import LeftDevices, report_left
from reactor.control.neighbours import Neighbours
from reactor.control.notify import notify, notify_reloading
from reactor.control.plan import Machine, Placement, place
from reactor.control.platform import Platform
from reactor.control.readiness import tell_ready
from reactor.control.saved import SavedState, Wish, wishes_at_start
from reactor.control.saving import Saving
from reactor.control.service import DiskStatus, Done, WorkerStatus
from reactor.control.shares import LET_GO_SECONDS, MEDIUM_SECONDS
from reactor.control.tags import prefix, tag
from reactor.control.workers import WorkerProcess, counters
from reactor.control.workforce import Workforce
from reactor.errors import ReactorError, UsageError
from reactor.log import logger, tell
from reactor.messages import Message
from reactor.options import Options
from reactor.spec import DiskSpec

TICK_SECONDS: Final = 1.0
SETTLED_TICKS: Final = 10
STOP_SECONDS: Final = 120.0  # an orderly stop; after that it is forced
FORCE_SECONDS: Final = 15.0

log = logger(__name__)


class Controller:
    """The desired disks, the workers, and the loop that brings them together."""

    def __init__(
        self,
        options: Options,
        platform: Platform,
        read_config: Callable[[], Sequence[DiskSpec] | None],
        handed: Mapping[str, Sequence[socket]],  # systemd's listening sockets
    ) -> None:
        self.started_at, self.started_ns = time.time(), platform.reactor.clock()
        self.exit_status = 0
        self.keeps = options.on_exit == "keep"  # devices, memory and state, when it stops
        self.reactor = platform.reactor
        self._options = options
        self._platform = platform
        self._read_config = read_config
        self._machine = Machine(options.cores, platform.cpus, registry.can_share)
        self._handed = handed
        self._disks: dict[str, DiskControl] = {}
        self._configured = Configured(platform, self._disks)
        self._neighbours = Neighbours(platform.reactor, self._disks, self._configured)
        self._saving = Saving(platform, self._save)
        self._took_over = False  # what a dead controller left
        self._suspects: tuple[int, ...] = ()  # cores whose workers may have any disk
        self._ticks = 0
        self.ready = self._reloading = self._stopping = self._forced = False
        self._holding = False  # while it is told to the disks, one by one, what all will be
        self._host = Host(
            platform,
            self._save,
            self._saving.soon,
            self._on_settled,
            lambda: self._holding,
            self._neighbours.rivals.listens,
            self._neighbours.hindrance,
            lambda disk: self._neighbours.attach_hindrance(disk, self._left_devices.disks),
            lambda: self._stopping and self.keeps,
            lambda: LET_GO_SECONDS + (0 if self._stopping else MEDIUM_SECONDS),
            lambda: options.strict and self._took_over and not self.ready,
            self._configured.is_succeeded,
        )
        self._left_devices = LeftDevices(platform, partial(self._on_settled, None))
        self._bus = platform.connect(self._on_event)
        awaited = partial(patience, self._disks)
        self._workforce = Workforce(
            platform, self._bus, options.cores, awaited, self._on_worker, self._on_hello
        )
        self._workers = self._workforce.by_core

    def begin(self, saved: SavedState | None, specs: Sequence[DiskSpec] | None) -> None:
        """Go on with what is `saved`, become what `specs` say, and start the workers.

        Without a config (None) what an earlier one asked for stays.
        """
        platform, saved = self._platform, saved or SavedState(complete=False)
        if specs is not None and saved.wishes and not saved.complete:
            saved = saved.as_held(specs, platform.held(prefix(platform.instance)))
        now = {spec.name: spec for spec in specs} if specs is not None else dict(saved.configured)
        wishes = wishes_at_start(saved, now, self._workforce.adopted, self._machine)
        self._configured.specs |= saved.configured
        self._configured.successors |= {
            name: successor for name, successor in saved.successors.items() if name in now
        }
        known = {wish.spec.name for wish in saved.wishes}
        left = report_left(platform, {(wish.spec.backend, wish.spec.name) for wish in wishes})
        if not saved.complete and (survivors := self._workforce.survivors):
            log.warning(
                "what ran before is not fully known: every disk waits until the worker of core %s,"
                " which may have it, has ended or has said what it has",
                ", ".join(map(str, survivors)),
            )
            self._suspects = survivors
        for wish in wishes:
            spec = wish.spec
            # With one connection and no timeout a request may take any time.
            patient = len(wish.placement.connections) == 1 and not spec.timeout
            device = platform.adopt(tag(platform.instance, spec), patient=patient)
            if device is None or spec.device not in ("auto", device.path):
                spec = wish.answered_spec
            if spec.name in known:
                disk = self._add(replace(wish, spec=spec), known=True)
            else:  # a worker that leaves may still listen on its addresses
                self._configured.note(spec.name, spec)
                disk = self._add(replace(wish, spec=spec, former=tuple(self._workforce.leaving)))
            if device is not None:  # also one that it is to leave: in order, and written back
                disk.adopt(device)
            self._took_over |= spec.name in known | left or device is not None
        self._save()
        self._left_devices.find([disk.spec for disk in self._disks.values() if disk.path])
        self._workforce.begin()
        with self._all_at_once():
            self._configured.resume(now)
        self._tick()

    def close(self) -> None:
        """Release everything. Workers that are left were to be killed, or else serve on."""
        if self._stopping:
            self._workforce.kill("the controller ends")
        self._bus.close()

    # --- Service: what front ends ask ---

    def disks(self) -> list[DiskStatus]:
        """Return every disk, in the order of their creation."""
        return [disk.status() for disk in self._disks.values()]

    def disk(self, name: str) -> DiskStatus | None:
        """Return one disk."""
        disk = self._disks.get(name)
        return disk.status() if disk is not None else None

    def workers(self) -> list[WorkerStatus]:
        """Return every worker, by core."""
        return [
            worker.status(
                tuple(disk.spec.name for disk in self._disks.values() if disk.share(worker))
            )
            for worker in self._workers.values()
        ]

    def create(self, spec: DiskSpec, done: Done) -> None:
        """Make a new disk and bring it up."""
        done = self._when_saved(done)
        try:
            if self._stopping:
                raise OSError(errno.ESHUTDOWN, "the service is stopping")
            check_new(spec, self._disks)
            wish = Wish(spec, place(spec, self._placed(), self._machine))
            self._saving.first(wish, self._state())
        except OSError as error:
            done(error)
            return
        disk = self._add(wish)

        def created(error: Exception | None) -> None:
            if error is not None and disk.desired == "online":
                # A disk that never was is not kept as failed.
                disk.want("gone", lambda _: done(error))
            else:
                done(error)

        disk.want("online", created)

    def start(self, name: str, done: Done) -> None:
        """Bring up a disk that is down."""
        disk = self._changeable(name, done)
        if disk is None:
            return
        if disk.desired == "stopped":
            try:
                disk = self._placed_anew(disk) if disk.settled else disk
                self._saving.first(replace(disk.wish, desired="online"), self._state())
            except OSError as error:
                done(error)
                return
        for core in disk.placement.cores:
            self._workers[core].revive()
        disk.want("online", self._when_saved(done))

    def stop(self, name: str, done: Done) -> None:
        """Drain and stop a disk; it stays known."""
        disk = self._changeable(name, done)
        if disk is not None:
            disk.want("stopped", self._when_saved(done))

    def remove(self, name: str, done: Done) -> None:
        """Hot-remove a disk and forget it."""
        disk = self._named(name, done)
        if disk is not None:
            self._configured.removed(disk)
            disk.want("gone", self._when_saved(done), hot=True)

    def resize(self, name: str, size: int, done: Done) -> None:
        """Change a disk's size and tell the kernel."""
        disk = self._named(name, done)
        if disk is not None:
            try:
                disk.resize(size, self._when_saved(done))
            except OSError as error:
                done(error)

    def attach(
        self, name: str, device: str | None, done: Callable[[str | Exception], None]
    ) -> None:
        """Attach a disk to a kernel device."""

        def attached(result: str | Exception) -> None:
            error = result if isinstance(result, Exception) else None
            self._when_saved(lambda error: done(error or result))(error)

        disk = self._disks.get(name)
        if disk is None:
            done(OSError(errno.ENODEV, f"there is no disk {name}"))
        elif self._stopping:
            done(OSError(errno.ESHUTDOWN, "the service is stopping"))
        elif device is not None and (other := holder(device, self._disks.values())) is not None:
            done(OSError(errno.EBUSY, f"{device} is in use by disk {other}"))
        elif (refusal := attach_refusal(disk)) is not None:
            done(refusal)
        else:
            wanted = disk.spec.with_device(device or "auto")
            try:
                self._saving.first(replace(disk.wish, spec=wanted, attaching=True), self._state())
            except OSError as error:
                done(error)
                return
            disk.attach(device or "auto", attached)

    def detach(self, device: str, done: Done) -> None:
        """Detach a device of ours."""
        name = holder(device, self._disks.values())
        if name is None:
            done(OSError(errno.ENODEV, f"{device} is not a device of this service"))
        elif self._stopping:
            done(OSError(errno.ESHUTDOWN, "the service is stopping"))
        else:
            self._disks[name].detach(self._when_saved(done))

    def reload(self, done: Done) -> None:
        """Read the config again and become what it says."""
        done = self._when_saved(done)
        try:
            if self._stopping:
                raise OSError(errno.ESHUTDOWN, "the service is stopping")
            specs = self._read_config()
            if specs is None:
                raise UsageError("the service was started without --config: nothing to reload")
            wanted = {spec.name: spec for spec in specs}
            plan = self._configured.plan(wanted, self._machine)
        except (ReactorError, OSError) as error:
            done(error)
            return
        self._reloading = True
        notify_reloading()
        with self._all_at_once():
            problems = self._configured.become(
                wanted, plan, lambda spec: self._add(Wish(spec, plan.places[spec.name]))
            )
        done(OSError(errno.EBUSY, problems) if problems else None)
        self._on_settled(None)

    @contextmanager
    def _all_at_once(self) -> Iterator[None]:
        """Have all disks know what they will be before any goes on, and save it as a whole."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        self._save()
        for disk in list(self._disks.values()):
            disk.step()

    def shut_down(self, *, keep: bool = False) -> None:
        """Stop in order, with `keep` as for --on-exit keep; a second time, by force."""
        if self._stopping:
            self._force()
            return
        log.info("stopping")
        notify("STOPPING=1\nSTATUS=stopping")
        self.keeps = self.keeps or keep
        if not self.keeps:  # memory goes with the disks, and so may this process before its end
            self._saving.save(self._state().let_go())
        self._stopping = True
        self._configured.successors.clear()
        self.reactor.call_later(STOP_SECONDS, self._force)
        for disk in list(self._disks.values()):
            disk.want("gone")
        self._end_if_stopped()

    # --- what happens ---

    def _on_event(self, identity: bytes, message: Message) -> None:
        worker = self._workforce.speaker(identity)
        if worker is None:
            log.debug("message %s of an ended worker %r", message["type"], identity[:64])
        elif not worker.heard(message):
            return
        elif message["type"] == "statistics":
            for name, given in message["disks"].items():
                disk = self._disks.get(name)
                share = disk.share(worker) if disk is not None else None
                if share is not None and isinstance(given, dict):
                    share.statistics = counters(given)
        else:
            disk = self._disks.get(message["disk"])
            share = disk.share(worker) if disk is not None else None
            if disk is not None and share is not None:
                disk.heard(share, message)

    def _on_hello(self, worker: WorkerProcess, message: Message) -> None:
        """Take over what the worker has."""
        reports = {report["spec"]["name"]: report for report in message["disks"]}
        self._took_over |= bool(reports) and not worker.spawned  # also if nothing was saved
        for disk in list(self._disks.values()):
            if (share := disk.share(worker)) is not None:
                report = reports.pop(disk.spec.name, None)
                if not disk.found(share, report, message["id"]):
                    worker.kill(f"it serves disk {disk.spec.name} with another config")
        if reports:
            worker.kill(f"it serves what it should not: {', '.join(reports)}")

    def _on_worker(self, worker: WorkerProcess) -> None:
        if worker.state == "running":
            worker.hand_listeners(self._handed)
        for disk in list(self._disks.values()):
            share = disk.share(worker)
            if share is not None and worker.state != "running":
                disk.worker_lost(share)
            elif share is not None or not disk.settled:  # it may have been on this worker
                disk.step()
        self._on_settled(None)

    def _on_settled(self, disk: DiskControl | None) -> None:
        if disk is not None and disk.desired == "gone":
            if self._disks.get(disk.spec.name) is disk:
                del self._disks[disk.spec.name]
                self._neighbours.rivals.remove(disk, for_good=True)
            self._succeed(disk)
        self._neighbours.wake()
        if self._stopping:
            self._end_if_stopped()
        elif self._reloading or not self.ready:
            # Later: a disk that is made now, and cannot be, is to go; it fails no strict start.
            self.reactor.call_from_thread(self._report_ready)

    def _succeed(self, disk: DiskControl) -> None:
        successor = self._configured.successors.pop(disk.spec.name, None)
        if successor is None:
            self._saving.soon(self._neighbours.wake)
            return
        spec, same = successor.spec, successor.spec.same_storage(disk.spec)
        placement = self._configured.place_of(spec, self._machine)
        made = disk.wish.made if same else 0
        if made and "size" in disk.spec.options:  # a resize may have ended meanwhile
            spec = spec.with_size(disk.spec.options["size"])
        wish = Wish(spec, placement, successor.desired, made=made, due=disk.due if same else 0)
        self._saving.soon(self._add(wish, known=same and disk.has_storage).step)

    def _report_ready(self) -> None:
        if self._stopping or not self._workforce.up or (self.ready and not self._reloading):
            return
        # By a strict start one that failed has its device left, for which another may wait.
        failing = (disk for disk in self._disks.values() if disk.failure and disk.path)
        left = self._options.strict and any(disk.state == "failed" for disk in failing)
        if not all(disk.settled for disk in self._disks.values()) and (self.ready or not left):
            return
        first, self.ready, self._reloading = not self.ready, True, False
        failed = [name for name, disk in self._disks.items() if disk.state == "failed"]
        if first and failed and self._options.strict:
            tell(f"nbd-reactor: not started: {', '.join(failed)} (--strict)")
            self.exit_status = 1
            # What was there before, and serves somebody, is left as it was found.
            self.shut_down(keep=self._took_over)
            return
        tell_ready(self.disks(), len(self._workers), first=first, demo=self._options.demo)

    def _tick(self) -> None:
        self.reactor.call_later(TICK_SECONDS, self._tick)
        self._workforce.look_after(keep_spare=not self._stopping)
        if self._workforce.known:
            self._left_devices.detach()
        self._save()
        self._ticks += 1
        for number, disk in enumerate(list(self._disks.values()), self._ticks):
            # Events tell what happens to a settled disk; it is looked at now and then all the same.
            if not disk.settled or number % SETTLED_TICKS == 0:
                disk.step()

    # --- stopping ---

    def _end_if_stopped(self) -> None:
        if not self._stopping or self._disks or self._forced:
            return
        self._workforce.shut_down()
        if self._workforce.gone and not self._left_devices.disks:
            self.reactor.stop()

    def _force(self) -> None:
        """End the workers first, so that no detach can wait for them; then the devices."""
        if self._forced:
            return
        log.warning("stopping by force")
        self._forced = True
        for disk in self._disks.values():
            disk.forced = True
        self._workforce.shut_down()
        self._workforce.kill("stopping by force")
        self.reactor.call_later(FORCE_SECONDS, self.reactor.stop)
        self._await_forced()

    def _await_forced(self) -> None:
        if self._disks or not self._workforce.gone or self._left_devices.disks:
            self.reactor.call_later(0.02, self._await_forced)
        else:
            self.reactor.stop()

    # --- the parts ---

    def _placed(self) -> list[tuple[DiskSpec, Placement]]:
        return [(disk.spec, disk.placement) for disk in self._disks.values()]

    def _placed_anew(self, disk: DiskControl) -> DiskControl:
        """Return the same disk, stopped, where it fits best now; raises OSError if nowhere."""
        others = [(d.spec, d.placement) for d in self._disks.values() if d.desired == "online"]
        placement = place(disk.spec, others, self._machine)
        if placement == disk.placement:
            return disk
        return self._add(replace(disk.wish, placement=placement), known=disk.has_storage)

    def _add(self, wish: Wish, *, known: bool = False) -> DiskControl:
        spec = wish.spec
        wish = replace(wish, former=tuple({*wish.former, *self._suspects}))
        disk = DiskControl(self._host, wish, self._workforce.everyone, known=known)
        if spec.name in self._disks:
            self._neighbours.rivals.remove(self._disks[spec.name], for_good=False)
        self._disks[spec.name] = disk
        self._neighbours.rivals.add(disk)
        return disk

    def _save(self) -> None:
        """Keep what should be, for the next controller; called before anything is done for it."""
        # Those that are stopped now come back, should this process die.
        if not (self._stopping or self._holding):
            self._saving.save(self._state())

    def _state(self) -> SavedState:
        wishes, configured = tuple(disk.wish for disk in self._disks.values()), self._configured
        return SavedState(wishes, dict(configured.successors), dict(configured.specs))

    def _when_saved(self, done: Done) -> Done:
        """Return a `done` that tells no success that the next controller would not know of."""

        def answer(error: Exception | None) -> None:
            self._save()
            done(self._saving.outcome(error, stopping=self._stopping))

        return answer

    def _changeable(self, name: str, done: Done) -> DiskControl | None:
        disk = self._named(name, done)
        if disk is not None and name in self._configured.successors:
            done(OSError(errno.EBUSY, f"disk {name} is being replaced by its new config"))
            return None
        return disk

    def _named(self, name: str, done: Done) -> DiskControl | None:
        disk = self._disks.get(name)
        if disk is None:
            done(OSError(errno.ENODEV, f"there is no disk {name}"))
        elif self._stopping:  # what it was comes back with the next start; no answer may hide that
            done(OSError(errno.ESHUTDOWN, "the service is stopping"))
            return None
        return disk

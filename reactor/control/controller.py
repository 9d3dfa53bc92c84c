"""The controller process: brings the disks up on the workers and keeps them so."""

from __future__ import annotations

import errno
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from setproctitle import setproctitle

from backends import registry
from reactor import config, pressure
from reactor.attach.device import adopt
from reactor.bus import ControllerBus
from reactor.control import leftovers
from reactor.control.demo import demo_disks
from reactor.control.disk import DiskControl, Host
from reactor.control.exporter import Exporter
from reactor.control.launcher import Launcher
from reactor.control.methods import methods
from reactor.control.notify import handed_sockets, notify
from reactor.control.plan import Machine, Placement, place, place_all
from reactor.control.rpc import RpcServer
from reactor.control.runtime import RuntimeDir
from reactor.control.service import DiskStatus, Done, WorkerStatus
from reactor.control.workers import WorkerProcess
from reactor.errors import ReactorError, UsageError, reason
from reactor.log import logger
from reactor.loop import Reactor
from reactor.messages import Message
from reactor.options import Options
from reactor.spec import DiskSpec

TICK_SECONDS: Final = 1.0
SETTLED_TICKS: Final = 10
STOP_SECONDS: Final = 120.0  # an orderly stop; after that it is forced
FORCE_SECONDS: Final = 15.0
DISKS_MAX: Final = 4096
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

log = logger(__name__)


def run(options: Options) -> int:
    """Run the service until it is asked to stop; returns the exit status."""
    setproctitle("nbd-reactor: controller")
    # Blocked until the loop can take them, and again when it is gone: an orderly stop is the only
    # way that they end this process.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    specs = _read_config(options)
    # While a worker is dead, I/O on its devices waits for this process to start another.
    pressure.prepare()
    if options.lock_memory:
        pressure.lock_memory()
    runtime = RuntimeDir(options.runtime_dir)
    try:
        runtime.end_leftover_workers()
        controller = Controller(options, runtime)
        try:
            controller.begin(specs)
            controller.reactor.run()
        finally:
            controller.close()
    finally:
        runtime.close()
    return controller.exit_status


def _read_config(options: Options) -> tuple[DiskSpec, ...]:
    if options.demo:
        return demo_disks(options.runtime_dir)
    if options.config is None:
        return ()
    return config.load(options.config, registry.schemas(), options.cores)


class Controller:
    """The desired disks, the workers, and the loop that brings them together."""

    def __init__(self, options: Options, runtime: RuntimeDir) -> None:
        self.started_at = time.time()
        self.exit_status = 0
        self.reactor = Reactor("interrupt")
        self._options = options
        self._machine = Machine(options.cores, os.cpu_count() or 1, registry.can_share)
        self._runtime = runtime
        self._disks: dict[str, DiskControl] = {}
        self._configured: dict[str, DiskSpec] = {}  # as the config gave them
        self._successors: dict[str, DiskSpec] = {}  # made when the disk of that name is gone
        self._ticks = 0
        self._ready = self._stopping = self._forced = False
        self._handed = handed_sockets()
        self._host = Host(
            self.reactor, runtime.instance, self._on_settled, self._may_attach, self._is_succeeded
        )
        self._bus = ControllerBus(self.reactor, runtime.path / "bus.sock", self._on_event)
        self._launcher = Launcher(options, runtime.instance)
        self._workers = {
            core: WorkerProcess(
                self.reactor, self._bus, self._launcher, runtime.path, core, self._on_worker
            )
            for core in options.cores
        }
        with ExitStack() as opened:
            opened.callback(self.reactor.close)
            opened.callback(self._bus.close)
            opened.callback(RpcServer(self.reactor, options.rpc_socket, methods(self)).close)
            if options.metrics is not None:
                opened.callback(Exporter(self.reactor, options.metrics, self).close)
            self._opened = opened.pop_all()

    def begin(self, specs: tuple[DiskSpec, ...]) -> None:
        """Start the workers and bring up `specs`."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self.reactor.add_signal(number, self.shut_down)
        self.reactor.add_signal(signal.SIGHUP, lambda: self.reload(_log_reload))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        try:
            places = place_all(specs, self._machine)
        except OSError as error:
            raise UsageError(reason(error)) from error
        for spec in specs:
            self._add(spec, places[spec.name])
            self._configured[spec.name] = spec
        leftovers.detach_unclaimed(self.reactor, self._host.tag(""), self._is_on_device)
        leftovers.report(self._runtime.instance, self._disks)
        for worker in self._workers.values():
            worker.spawn()
        self._tick()

    def close(self) -> None:
        """Release everything; the workers are gone or are killed here."""
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        for worker in self._workers.values():
            worker.kill("the controller ends")
        self._launcher.close()
        for socks in self._handed.values():
            for sock in socks:
                sock.close()
        self._opened.close()

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
        try:
            self._check_new(spec)
            disk = self._add(spec, place(spec, self._placed(), self._machine))
        except OSError as error:
            done(error)
            return

        def created(error: Exception | None) -> None:
            if error is not None:  # a disk that never was is not kept as failed
                disk.want("gone", lambda _: done(error))
            else:
                done(None)

        disk.want("online", created)

    def start(self, name: str, done: Done) -> None:
        """Bring up a disk that is down."""
        disk = self._named(name, done)
        if disk is not None and self._stopping:
            done(OSError(errno.ESHUTDOWN, "the service is stopping"))
        elif disk is not None:
            for core in disk.placement.cores:
                self._workers[core].revive()
            disk.want("online", done)

    def stop(self, name: str, done: Done) -> None:
        """Drain and stop a disk; it stays known."""
        disk = self._named(name, done)
        if disk is not None:
            disk.want("stopped", done)

    def remove(self, name: str, done: Done) -> None:
        """Hot-remove a disk and forget it."""
        disk = self._named(name, done)
        if disk is not None:
            self._successors.pop(name, None)
            disk.want("gone", done, hot=True)

    def resize(self, name: str, size: int, done: Done) -> None:
        """Change a disk's size and tell the kernel."""
        disk = self._named(name, done)
        if disk is not None:
            disk.resize(size, done)

    def attach(
        self, name: str, device: str | None, done: Callable[[str | Exception], None]
    ) -> None:
        """Attach a disk to a kernel device."""
        disk = self._disks.get(name)
        if disk is None:
            done(OSError(errno.ENODEV, f"there is no disk {name}"))
        elif device is not None and self._holder(device) is not None:
            done(OSError(errno.EBUSY, f"{device} is in use by disk {self._holder(device)}"))
        else:
            disk.attach(device, done)

    def detach(self, device: str, done: Done) -> None:
        """Detach a device of ours."""
        name = self._holder(device)
        if name is None:
            done(OSError(errno.ENODEV, f"{device} is not a device of this service"))
        else:
            self._disks[name].detach(done)

    def reload(self, done: Done) -> None:
        """Read the config again and become what it says."""
        if self._stopping:
            done(OSError(errno.ESHUTDOWN, "the service is stopping"))
            return
        try:
            specs = _read_config(self._options)
            wanted = {spec.name: spec for spec in specs}
            places = place_all(specs, self._machine)
        except (ReactorError, OSError) as error:
            done(error)
            return
        before, self._configured = self._configured, wanted
        for name in before.keys() - wanted.keys() & self._disks.keys():
            self._successors.pop(name, None)
            self._disks[name].want("gone")
        for name, spec in wanted.items():
            disk = self._disks.get(name)
            if disk is None:
                self._add(spec, places[name]).step()
            elif spec != before.get(name) or disk.desired == "gone":
                self._change(disk, spec)
            elif disk.state == "failed":  # one whose storage was removed waits for `start`
                disk.want("online")
        done(None)

    def _change(self, disk: DiskControl, spec: DiskSpec) -> None:
        """Make `disk` what `spec` says: in place if it can be, else by a new disk of its name."""
        if disk.desired == "gone" or not disk.change(spec):
            self._successors[spec.name] = spec
            disk.want("gone")

    def _is_succeeded(self, disk: DiskControl) -> bool:
        successor = self._successors.get(disk.spec.name)
        return successor is not None and successor.same_storage(disk.spec)

    def shut_down(self) -> None:
        """Stop in order; a second time, by force."""
        if self._stopping:
            self._force()
            return
        log.info("stopping")
        notify("STOPPING=1")
        self._stopping = True
        self._successors.clear()
        self.reactor.call_later(STOP_SECONDS, self._force)
        for disk in list(self._disks.values()):
            disk.keep_device = self._options.on_exit == "keep"
            disk.want("gone")
        self._end_if_stopped()

    # --- what happens ---

    def _on_event(self, identity: bytes, message: Message) -> None:
        worker = next((w for w in self._workers.values() if w.owns(identity)), None)
        if worker is None:
            log.debug("message %s of an ended worker %r", message["type"], identity[:64])
            return
        kind = message["type"]
        if kind == "statistics":
            worker.heard(kind, _counters(message["reactor"]))
            for name, counters in message["disks"].items():
                disk = self._disks.get(name)
                share = disk.share(worker) if disk is not None else None
                if share is not None and isinstance(counters, dict):
                    share.statistics = _counters(counters)
            return
        worker.heard(kind)
        disk = self._disks.get(message.get("disk", ""))
        share = disk.share(worker) if disk is not None else None
        if disk is not None and share is not None:
            disk.heard(share, message)

    def _on_worker(self, worker: WorkerProcess) -> None:
        if worker.state == "running":
            self._hand_listeners(worker)
        for disk in list(self._disks.values()):
            share = disk.share(worker)
            if share is not None and worker.state == "running":
                disk.step()
            elif share is not None:
                disk.worker_lost(share)
        self._on_settled(None)

    def _on_settled(self, disk: DiskControl | None) -> None:
        if disk is not None and disk.desired == "gone":
            if self._disks.get(disk.spec.name) is disk:
                del self._disks[disk.spec.name]
            self._succeed(disk)
        for other in list(self._disks.values()):
            if other.path is None and other.spec.device is not None:
                # It may have waited for this disk's device.
                self.reactor.call_from_thread(other.step)
        if self._stopping:
            self._end_if_stopped()
        elif not self._ready:
            up = all(worker.state in ("running", "failed") for worker in self._workers.values())
            if up and all(disk.settled for disk in self._disks.values()):
                self._report_ready()

    def _succeed(self, disk: DiskControl) -> None:
        spec = self._successors.pop(disk.spec.name, None)
        if spec is None:
            return
        try:
            placement = place(spec, self._placed(), self._machine)
        except OSError as error:
            log.error("%s", reason(error))
            disk.discard()
        else:
            self._add(spec, placement).step()

    def _may_attach(self, disk: DiskControl) -> bool:
        """Whether no other disk's device must come or go first."""
        if disk.spec.device == "auto":
            # Whoever names its device goes first, or `auto` might take it.
            return not any(other.awaits_device for other in self._disks.values())
        return not any(
            other.path == disk.spec.device and other.leaves_device for other in self._disks.values()
        )

    def _report_ready(self) -> None:
        self._ready = True
        failed = [disk.spec.name for disk in self._disks.values() if disk.state != "online"]
        if failed and self._options.strict:
            _tell(f"nbd-reactor: not started: {', '.join(failed)} (--strict)")
            self.exit_status = 1
            self.shut_down()
            return
        online = len(self._disks) - len(failed)
        line = f"ready: {online} of {len(self._disks)} disks on {len(self._workers)} workers"
        if failed:
            line += f"; failed: {', '.join(failed)}"
        notify(f"READY=1\nSTATUS={line}")
        _tell(line)
        if self._options.demo:
            self._tell_demo()

    def _tell_demo(self) -> None:
        for disk in self._disks.values():
            addresses = [str(address) for address in disk.spec.listen]
            where = " and ".join([disk.path, *addresses] if disk.path else addresses)
            _tell(f"disk {disk.spec.name}: {where}")

    def _tick(self) -> None:
        self.reactor.call_later(TICK_SECONDS, self._tick)
        for worker in self._workers.values():
            worker.look_after()
        self._keep_spare()
        self._ticks += 1
        for number, disk in enumerate(list(self._disks.values()), self._ticks):
            # Events tell what happens to a settled disk; it is looked at now and then all the same.
            if not disk.settled or number % SETTLED_TICKS == 0:
                disk.step()

    def _keep_spare(self) -> None:
        if self._stopping or any(w.state != "running" for w in self._workers.values()):
            return
        try:
            self._launcher.keep_spare()
        except OSError as error:
            log.warning("no spare worker can be started: %s", reason(error))

    # --- stopping ---

    def _end_if_stopped(self) -> None:
        if not self._stopping or self._disks or self._forced:
            return
        for worker in self._workers.values():
            worker.shut_down()
        if all(worker.pid is None for worker in self._workers.values()):
            self.reactor.stop()

    def _force(self) -> None:
        """End the workers first, so that no detach can wait for them; then the devices."""
        if self._forced:
            return
        log.warning("stopping by force")
        self._forced = True
        for disk in self._disks.values():
            disk.forced = True
        for worker in self._workers.values():
            worker.shut_down()
            worker.kill("stopping by force")
        self.reactor.call_later(FORCE_SECONDS, self.reactor.stop)
        self._await_forced()

    def _await_forced(self) -> None:
        if self._disks or any(worker.pid is not None for worker in self._workers.values()):
            self.reactor.call_later(0.02, self._await_forced)
        else:
            self.reactor.stop()

    # --- the parts ---

    def _placed(self) -> list[tuple[DiskSpec, Placement]]:
        return [(disk.spec, disk.placement) for disk in self._disks.values()]

    def _add(self, spec: DiskSpec, placement: Placement) -> DiskControl:
        disk = DiskControl(self._host, spec, placement, self._workers)
        self._disks[spec.name] = disk
        left = adopt(self._host.tag(spec.name)) if spec.device is not None else None
        if left is not None:
            disk.adopt(left)
        return disk

    def _is_on_device(self, name: str) -> bool:
        disk = self._disks.get(name)
        return disk is not None and disk.path is not None

    def _check_new(self, spec: DiskSpec) -> None:
        if self._stopping:
            raise OSError(errno.ESHUTDOWN, "the service is stopping")
        if spec.name in self._disks:
            raise OSError(errno.EEXIST, f"there is a disk {spec.name} already")
        if len(self._disks) >= DISKS_MAX:
            raise OSError(errno.ENOSPC, f"there are {DISKS_MAX} disks already")
        if spec.device not in (None, "auto") and self._holder(spec.device) is not None:
            raise OSError(
                errno.EEXIST, f"{spec.device} is in use by disk {self._holder(spec.device)}"
            )

    def _holder(self, device: str | None) -> str | None:
        for disk in self._disks.values():
            if device == disk.path or (device == disk.spec.device and device != "auto"):
                return disk.spec.name
        return None

    def _named(self, name: str, done: Done) -> DiskControl | None:
        disk = self._disks.get(name)
        if disk is None:
            done(OSError(errno.ENODEV, f"there is no disk {name}"))
        return disk

    def _hand_listeners(self, worker: WorkerProcess) -> None:
        for name, socks in self._handed.items():
            try:
                worker.hand_over("listener", [sock.fileno() for sock in socks], name=name)
            except OSError as error:
                log.error("socket %s of systemd is not handed over: %s", name, reason(error))


def _counters(given: dict[Any, Any]) -> dict[str, int]:
    return {
        name: count
        for name, count in given.items()
        if isinstance(name, str) and isinstance(count, int)
    }


def _tell(line: str) -> None:
    """Tell the operator on standard error, whatever the log level is."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _log_reload(error: Exception | None) -> None:
    if error is None:
        log.info("config reloaded")
    else:
        log.error("config not reloaded, nothing is changed: %s", error)

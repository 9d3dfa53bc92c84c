"""The controller's platform on the simulated host, for one life of a controller."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from reactor.control.clock import WakingClock
from reactor.control.platform import Survivor
from reactor.errors import DeviceError, ReactorError
from reactor.loop import NEVER, Reactor
from reactor.messages import Message
from tests.simulation.bus import ControllerEnd
from tests.simulation.devices import IoctlDevice, NetlinkDevice, SimulatedDevice, Waits
from tests.simulation.faults import NO_PROCESS, NO_SOCKET, NO_SPACE, UNSAVEABLE
from tests.simulation.host import INSTANCE, Host
from tests.simulation.kernel import DEFAULT_IO_TIMEOUT
from tests.simulation.processes import WorkerProcess
from tests.simulation.streams import End, Stream
from tests.simulation.world import NS, Violation

BUSY_SECONDS: Final = 1.0
WAIT_SECONDS: Final = 0.1  # until a call that waits is looked at again
IO_TIMEOUT: Final = 1.0  # of a device with one connection


class ControllerDied(BaseException):
    """Raised through the controller's code when its process ends, wherever it is."""


class SimulatedReactor(Reactor):
    """A reactor whose time is the world's."""

    def __init__(self, platform: SimulatedPlatform) -> None:
        clock = WakingClock(platform.host.world.clock)
        super().__init__("interrupt", clock=clock, poll=platform.poll)
        self.stopped = False

    def stop(self) -> None:
        self.stopped = True


class SimulatedPlatform:
    """See `reactor.control.platform.Platform`."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.world = host.world
        self.instance = INSTANCE
        self.boot = str(host.boots)
        self.pid = host.new_pid()
        self.cpus = host.cpus
        self.dead = False
        self.ends: dict[End, None] = {}  # that the process has open
        self.calls = 0  # under way
        self.asleep = True
        self.paused = False  # by SIGSTOP
        self.reactor = SimulatedReactor(self)
        self._bus: ControllerEnd | None = None
        self._ioctl_devices: list[IoctlDevice] = []

    # --- life and death ---

    def poll(self, seconds: float) -> list[tuple[int, int]]:
        """Let the world go on until the reactor has something to do."""
        world = self.world
        deadline = None if seconds == NEVER else world.now + round(seconds * NS)
        while self.asleep or self.paused:
            time = world.next_time()
            ends = deadline is not None and (time is None or time > deadline)
            if ends and not self.paused:
                assert deadline is not None
                world.now = max(world.now, deadline)
                break
            if time is None:
                raise Violation("nothing will ever happen")
            world.happen()
            if self.dead:
                raise ControllerDied
        self.asleep = True
        return []

    def wake(self, function: Callable[[], object]) -> None:
        """Have the reactor call `function`."""
        if not self.dead:
            self.asleep = False
            self.reactor.call_from_thread(function)

    def pause(self) -> None:
        """Stop the process; what it waits for interruptibly, as for its ioctl devices, ends."""
        self.world.note("the controller is stopped")
        self.paused = True
        for device in self._ioctl_devices:
            device.end_with_controller()

    def go_on(self) -> None:
        """Continue the process."""
        self.world.note("the controller goes on")
        self.paused = False

    def die(self) -> None:
        """End the process, and all that it holds."""
        if self.dead:
            return
        self.dead = True
        self.asleep = False
        if self._bus is not None:
            self._bus.close()
        for end in list(self.ends):
            end.close()
        for device in self._ioctl_devices:
            device.end_with_controller()

    def _step(self) -> None:
        """Die here, perhaps."""
        if self.dead:
            raise ControllerDied
        if self.host.faults.strikes("the controller dies at a step"):
            self.world.note("the controller dies at a step")
            self.die()
            raise ControllerDied

    # --- workers ---

    def connect(self, on_event: Callable[[bytes, Message], None]) -> ControllerEnd:
        """Open the bus."""

        def deliver(identity: bytes, message: Message) -> None:
            self.wake(lambda: on_event(identity, message))

        self._bus = self.host.hub.listen(deliver)
        return self._bus

    def survivors(self) -> list[Survivor]:
        """Return the workers that live."""
        return [
            Survivor(core, WatchedProcess(self, process, is_child=False), process.is_current)
            for core, process in sorted(self.host.core_locks.items())
        ]

    def launch(self, core: int) -> WatchedProcess:
        """Start a worker."""
        self._step()
        self.host.faults.check("no process", NO_PROCESS)
        process = self.host.start_process(core)
        self._step()
        return WatchedProcess(self, process, is_child=True)

    def keep_spare(self) -> None:
        """Keep none."""

    def hand_over(self, core: int, kind: str, socks: Sequence[End], **fields: Any) -> None:
        """Give a worker a copy of a socket."""
        self._step()
        self.host.faults.check("nothing can be handed over", NO_SOCKET)
        (sock,) = socks
        self.host.send_mail(core, kind, sock, fields)
        self._step()

    # --- the kernel ---

    def socket_pair(self) -> tuple[End, End]:
        """Return the kernel's end and the worker's."""
        self._step()
        self.host.faults.check("no socket", NO_SOCKET)
        stream = Stream(self.world)
        return End(stream.kernel, self.ends), End(stream.worker, self.ends)

    def attach(
        self, device: str, way: str, *, kernel_ends: Sequence[End], **fields: Any
    ) -> SimulatedDevice:
        """Attach a device."""
        netlink = way == "netlink" or (way == "auto" and self.host.driver.has_netlink)
        began = self.world.now
        return self._attach(device, kernel_ends, fields, began=began, netlink=netlink)

    def _attach(
        self,
        device: str,
        kernel_ends: Sequence[End],
        fields: dict[str, Any],
        *,
        began: int,
        netlink: bool,
    ) -> SimulatedDevice:
        driver = self.host.driver
        again = partial(self._attach, device, kernel_ends, fields, began=began, netlink=netlink)
        if netlink and driver.is_locked:
            raise Waits(again)
        try:
            if netlink and not driver.has_netlink:
                raise DeviceError(errno.EOPNOTSUPP, "the kernel's nbd driver offers no netlink")
            kernel = driver.connect(
                device, way="netlink" if netlink else "ioctl", kernel_ends=kernel_ends, **fields
            )
        except DeviceError as error:
            if error.errno == errno.EBUSY and self.world.now - began < BUSY_SECONDS * NS:
                raise Waits(again) from None
            self._close(kernel_ends)
            raise
        kernel.io_timeout = DEFAULT_IO_TIMEOUT
        self._step()
        if netlink and len(kernel_ends) == 1 and not fields["timeout"]:
            kernel.io_timeout = IO_TIMEOUT
        self._close(kernel_ends)
        if netlink:
            return NetlinkDevice(driver, kernel)
        held = IoctlDevice(driver, kernel)
        self._ioctl_devices.append(held)
        return held

    @staticmethod
    def _close(ends: Sequence[End]) -> None:
        for end in ends:
            end.close()

    def adopt(self, tag: str, *, patient: bool = False) -> NetlinkDevice | None:
        """Return the device that the kernel holds under the tag."""
        found = [d for d in self.host.driver.configured() if d.tag == tag and d.way == "netlink"]
        # Several: all but one are disconnected and still open.
        device = next((d for d in found if d.serving), found[0] if found else None)
        if device is None:
            return None
        if patient:
            device.io_timeout = IO_TIMEOUT
        return NetlinkDevice(self.host.driver, device)

    def claims(self, device: str, _seconds: float) -> list[str]:
        """Return the applications that have mounted the device."""
        (kernel,) = (kernel for kernel in self.host.driver.devices if kernel.path == device)
        return [str(opener) for opener in kernel.openers if getattr(opener, "mounts", False)]

    def held(self, prefix: str) -> list[str]:
        """Return the tags of what the kernel holds."""
        devices = self.host.driver.configured()
        return [d.tag for d in devices if d.tag.startswith(prefix) and d.way == "netlink"]

    def call(
        self,
        name: str,
        seconds: float,
        function: Callable[[], Any],
        done: Callable[[Any, Exception | None], None],
        late: Callable[[Any], None] | None = None,
    ) -> SimulatedCall:
        """Make a call that takes its time."""
        self._step()
        return SimulatedCall(self, name, seconds, function, done, late)

    # --- what is kept ---

    def save(self, state: bytes) -> None:
        """Keep the state."""
        self._step()
        self.host.faults.check(UNSAVEABLE, NO_SPACE)
        self.host.saved, self.host.unsaved = state, False
        self.host.saves += 1
        self._step()

    def outdate(self) -> None:
        """Note that the state is old."""
        self.host.unsaved = True

    def leftovers(self) -> list[tuple[str, str]]:
        """Return the disks that have memory."""
        return [("malloc", disk) for disk in self.host.store.memories()]

    def discard(self, backend: str, disk: str) -> None:
        """Remove a disk's memory."""
        self._step()
        self.host.store.discard(backend, disk)
        self._step()


class WatchedProcess:
    """A worker's process, as one controller knows it."""

    def __init__(
        self, platform: SimulatedPlatform, process: WorkerProcess, *, is_child: bool
    ) -> None:
        self.pid = process.pid
        self._platform = platform
        self._process = process
        self._is_child = is_child

    def watch(self, on_exit: Callable[[int | None], None]) -> None:
        """Call `on_exit` when it is gone."""

        def gone(status: int) -> None:
            self._platform.wake(lambda: on_exit(status if self._is_child else None))

        if self._process.gone:
            gone(self._process.status)
        else:
            self._process.watcher = gone

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def waits_for_medium(self) -> bool:
        """Whether it cannot even be killed."""
        return self._process.waits_for_medium()

    def progress(self) -> int:
        """Return what is another number when it has run."""
        return self._process.progress()


class SimulatedCall:
    """A blocking call: what it does happens at one moment, its result comes at a later one."""

    def __init__(
        self,
        platform: SimulatedPlatform,
        name: str,
        seconds: float,
        function: Callable[[], Any],
        done: Callable[[Any, Exception | None], None],
        late: Callable[[Any], None] | None,
    ) -> None:
        self._platform = platform
        self._name = name
        self._function = function
        self._done: Callable[[Any, Exception | None], None] | None = done
        self._late = late
        self._timer = platform.reactor.call_later(seconds, self._expire)
        platform.calls += 1
        platform.world.after(platform.host.faults.call_seconds(), self._run)

    def abandon(self) -> None:
        """Make sure that `done` does not come."""
        self._done = None
        self._timer.cancel()

    def _run(self) -> None:
        platform = self._platform
        if platform.dead:
            return
        result, error = None, None
        try:
            if self._name.startswith("detaching"):
                platform.host.faults.check("nothing to detach a device with", NO_SOCKET)
            result = self._function()
        except Waits as waits:
            self._function = waits.again
            platform.world.after(WAIT_SECONDS, self._run)
            return
        except (OSError, ReactorError) as raised:
            error = raised
        platform.calls -= 1
        platform.world.note("%s: %s", self._name, error or result or "done")
        finish = partial(platform.wake, partial(self._finish, result, error))
        platform.world.after(platform.host.faults.call_seconds(), finish)

    def _finish(self, result: Any, error: Exception | None) -> None:
        self._timer.cancel()
        done, self._done = self._done, None
        if done is not None:
            done(result, error)
        elif error is None and self._late is not None:
            self._late(result)

    def _expire(self) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(None, DeviceError(errno.ETIMEDOUT, f"{self._name} did not finish"))

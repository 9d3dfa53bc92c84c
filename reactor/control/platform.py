"""What the controller's logic needs of the world around it: Linux, or a simulation of it.

The reactor aside, nothing under `reactor.control` that decides anything touches the operating
system but through this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import socket
from typing import Any, Protocol, TypeVar

from reactor.attach.device import Device
from reactor.loop import Reactor
from reactor.messages import Message
from reactor.spec import AttachWay

Result = TypeVar("Result")


class Process(Protocol):
    """A worker's process: a child, or one that an earlier controller started."""

    @property
    def pid(self) -> int:
        """Its id."""

    def watch(self, on_exit: Callable[[int | None], None]) -> None:
        """Call `on_exit(status)`, as Popen has it, once it is gone; None: it was not our child."""

    def send_signal(self, number: int) -> None:
        """Send a signal; nothing happens when it has ended."""

    def waits_for_medium(self) -> bool:
        """Whether it cannot run, not even be killed, before some I/O ends."""

    def progress(self) -> int | None:
        """Return a number that is another one whenever it has run; None: that cannot be seen."""


@dataclass(frozen=True, slots=True)
class Survivor:
    """A worker whose controller died. Only one that was started as ours are can be adopted."""

    core: int
    process: Process
    is_ours: bool


class Bus(Protocol):
    """The controller's end of the control bus."""

    def send(self, worker: bytes, kind: str, **fields: Any) -> bool:
        """Queue a command for `worker`; False when it is not connected or does not receive."""

    def close(self) -> None:
        """Say no more and hear no more."""


class Call(Protocol):
    """A blocking call under way."""

    def abandon(self) -> None:
        """Make sure that `done` does not come."""


class Platform(Protocol):
    """One host, as one service sees it."""

    reactor: Reactor
    instance: str  # the service's name on this host
    boot: str  # names the time since the host was booted
    pid: int  # this process
    cpus: int  # all that there are, not only those of the workers

    # --- workers ---

    def connect(self, on_event: Callable[[bytes, Message], None]) -> Bus:
        """Open the bus; `on_event(identity, message)` gets what workers say. Raises BusError."""

    def survivors(self) -> list[Survivor]:
        """Return the workers that live; asked once, before any is launched."""

    def launch(self, core: int) -> Process:
        """Start the worker of `core`; raises OSError."""

    def keep_spare(self) -> None:
        """Have a process ready for the next launch, if that is wanted; raises OSError."""

    def hand_over(self, core: int, kind: str, socks: Sequence[socket], **fields: Any) -> None:
        """Give copies of `socks` to the worker of `core`; raises OSError."""

    # --- the kernel ---

    def socket_pair(self) -> tuple[socket, socket]:
        """Return the kernel's end and the worker's end of a new connection; raises OSError."""

    def attach(
        self,
        device: str,
        way: AttachWay,
        *,
        tag: str,
        size: int,
        block_size: int,
        flags: int,
        kernel_ends: Sequence[socket],
        timeout: int | None,
        dead_timeout: int,
    ) -> Device:
        """Attach a device; may block. See `reactor.attach.device.attach`."""

    def adopt(self, tag: str, *, patient: bool = False) -> Device | None:
        """Return the device that the kernel holds under exactly this tag.

        `patient`: its requests may take any time; who attached it may have died before it said so.
        """

    def claims(self, device: str, seconds: float) -> list[str]:
        """Return what stands on an attached device, in words: mounts, swap, other devices.

        Raises OSError when that cannot be known, or the device does not answer for so long.
        """

    def held(self, prefix: str) -> list[str]:
        """Return the tags that begin with `prefix` of all devices that the kernel holds."""

    def call(
        self,
        name: str,
        seconds: float,
        function: Callable[[], Result],
        done: Callable[[Result | None, Exception | None], None],
        late: Callable[[Result], None] | None = None,
    ) -> Call:
        """Make a call that may block; `done(result, error)` comes exactly once, in the reactor.

        After `seconds` the error is DeviceError ETIMEDOUT; what the call then returns after all
        goes to `late`.
        """

    # --- what is kept ---

    def save(self, state: bytes) -> None:
        """Make `state` what the next controller finds; raises OSError, the old one is kept then."""

    def outdate(self) -> None:
        """Have the next controller know that what it finds is not all."""

    def leftovers(self) -> list[tuple[str, str]]:
        """Return each backend and disk of which there is data outside its workers."""

    def discard(self, backend: str, disk: str) -> None:
        """Remove what a disk keeps outside its workers; raises OSError or ReactorError."""

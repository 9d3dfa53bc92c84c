"""The controller as its front ends (JSON-RPC, metrics) see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeAlias

from reactor.loop import Reactor
from reactor.spec import DiskSpec

#: starting: not up yet (or again); online: served; stopped: on request; removed: its storage went
#: away; failed: it could not come up and `reason` says why.
DiskState: TypeAlias = Literal["starting", "online", "stopping", "stopped", "removed", "failed"]

#: Called exactly once with None, or with the OSError or ReactorError that the operator should see.
Done: TypeAlias = Callable[[Exception | None], None]


class UnsavedError(OSError):
    """What was asked for is done, but a service that starts later need not know of it."""


@dataclass(frozen=True, slots=True)
class DiskStatus:
    """What a disk is now. Sizes in bytes; 0 while they are not known."""

    spec: DiskSpec
    state: DiskState
    reason: str  # "" while all is well
    cores: tuple[int, ...]  # of all workers that serve it, the owner's first
    size: int
    block_size: int
    flags: int  # transmission flags
    device: str | None  # the device really attached
    statistics: Mapping[str, int] = field(default_factory=dict)  # as the workers count them

    @property
    def core(self) -> int:
        """Of the worker that owns it and serves its listeners."""
        return self.cores[0]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """What a worker is now. Times in ns since it began."""

    core: int
    pid: int | None
    state: Literal["starting", "running", "waiting", "failed"]
    restarts: int
    disks: tuple[str, ...]
    statistics: Mapping[str, int] = field(default_factory=dict)


class Service(Protocol):
    """What front ends may ask for. Everything here returns at once; results come by `Done`."""

    reactor: Reactor
    started_at: float  # seconds since the epoch
    started_ns: int  # by the reactor's clock, which nobody sets

    def disks(self) -> list[DiskStatus]:
        """Return every disk, in the order of their creation."""

    def disk(self, name: str) -> DiskStatus | None:
        """Return one disk."""

    def workers(self) -> list[WorkerStatus]:
        """Return every worker, by core."""

    def create(self, spec: DiskSpec, done: Done) -> None:
        """Make a new disk and bring it up; EEXIST when the name or its device is taken."""

    def start(self, name: str, done: Done) -> None:
        """Bring up a stopped, removed or failed disk; nothing to do when it is online."""

    def stop(self, name: str, done: Done) -> None:
        """Drain and stop a disk; it stays known and can be started again. ENODEV when absent."""

    def remove(self, name: str, done: Done) -> None:
        """Hot-remove a disk with all its exports and forget it; done when it is released."""

    def resize(self, name: str, size: int, done: Done) -> None:
        """Change a disk's size and tell the kernel."""

    def attach(
        self, name: str, device: str | None, done: Callable[[str | Exception], None]
    ) -> None:
        """Attach the disk to `device` (None: the first free); `done` gets the path or the error.

        ENODEV no such disk, EBUSY the device is in use, EPERM the disk has another device.
        """

    def detach(self, device: str, done: Done) -> None:
        """Detach the device, waiting until it is free again; ENODEV when it is not ours."""

    def reload(self, done: Done) -> None:
        """Read the config again: new disks start, missing ones stop, changed ones change."""

    def shut_down(self) -> None:
        """Stop as SIGTERM does."""

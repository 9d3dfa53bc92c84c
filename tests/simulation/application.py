"""A program on /dev/nbdN: writes numbers, and knows which ones must be there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Final

from tests.simulation.host import Host
from tests.simulation.kernel import KernelDevice, Kind, Request

BLOCKS: Final = 6
DEPTH: Final = 3  # requests at once


class Ledger:
    """What may be found in each block of a disk. Later values of a block are greater."""

    def __init__(self) -> None:
        self.acknowledged: dict[int, int] = {}
        self.flushed: dict[int, int] = {}  # not even the host's crash may lose these
        self.unsure: defaultdict[int, set[int]] = defaultdict(set)  # answered with an error
        self.left: defaultdict[int, set[int]] = defaultdict(set)  # from before they were forgotten
        self.last = 0
        self._unflushed: defaultdict[int, set[int]] = defaultdict(set)  # begun since the flush

    def begin(self, block: int) -> int:
        """Return a new number to write."""
        self.last += 1
        self._unflushed[block].add(self.last)
        return self.last

    def end(self, block: int, value: int, error: int) -> None:
        """Note how a write ended."""
        if error:
            self.unsure[block].add(value)
        else:
            self.acknowledged[block] = value
            self.left[block].clear()

    def end_flush(self, covered: Mapping[int, int]) -> None:
        """Note that a flush ended well, and what had been acknowledged when it began."""
        for block, value in covered.items():
            self.flushed[block] = max(value, self.flushed.get(block, 0))
            self._unflushed[block] = {v for v in self._unflushed[block] if v > value}

    def allows(self, block: int, value: int) -> bool:
        """Whether `value` may be in the block while nothing is in flight."""
        known = value == self.acknowledged.get(block, 0)
        return known or value in self.unsure[block] or value in self.left[block]

    def forget(self) -> None:
        """Expect nothing: the data are gone, as was asked for, or may be."""
        for block in range(BLOCKS):
            value, flushed = self.acknowledged.pop(block, 0), self.flushed.pop(block, 0)
            self.left[block].update((0, value))
            self._unflushed[block].add(flushed)  # should it be there still, a crash may show it

    def lose_unflushed(self) -> None:
        """Expect what was flushed, or what was written since: the host has crashed."""
        for block in range(BLOCKS):
            self.acknowledged[block] = self.flushed.get(block, 0)
            self.left[block].update(self._unflushed[block])

    def lose_all(self) -> None:
        """Expect zeros: memory is gone with the host."""
        for kept in (self.acknowledged, self.flushed, self.unsure, self.left, self._unflushed):
            kept.clear()


class Application:
    """One program for one disk. It opens the device when there is one, and leaves on an error.

    Some mount it: no change of the config may take the device away from them.
    """

    def __init__(
        self, host: Host, disk: str, on_error: Callable[[str, KernelDevice, int], None]
    ) -> None:
        self.disk = disk
        self.ledgers: defaultdict[str, Ledger] = defaultdict(Ledger)  # by storage
        self.checked = True  # the disk keeps what is written
        self.mounts = host.world.chance(0.3)
        self._host = host
        self._world = host.world
        self._on_error = on_error
        self._device: KernelDevice | None = None
        self._ledger = Ledger()  # of the storage of that
        self._busy: dict[int, None] = {}  # blocks with a request in flight
        self._leaving = False
        self._ended = False
        self._world.soon(1.0, self._turn)

    def __repr__(self) -> str:
        return f"application on disk {self.disk}"

    @property
    def idle(self) -> bool:
        """Whether nothing is in flight."""
        return not self._busy

    @property
    def is_mounted(self) -> bool:
        """Whether it has the device mounted now."""
        return self.mounts and self._device is not None and not self._leaving

    def crash(self, *, keeps: bool) -> None:
        """Begin anew after the host's crash; `keeps`: the disk is no memory."""
        self._device = None
        self._busy.clear()
        self._leaving = False
        for ledger in self.ledgers.values():
            if keeps:
                ledger.lose_unflushed()
            else:
                ledger.lose_all()

    def forget(self) -> None:
        """Expect nothing of its data."""
        for ledger in self.ledgers.values():
            ledger.forget()

    def finish(self) -> None:
        """Begin nothing more, and leave."""
        self._ended = True
        if self._device is not None and not self._leaving:
            self._leave()

    def _turn(self) -> None:
        if self._ended:
            return
        self._world.after(self._world.between(0.05, 1.5), self._turn)
        if self._device is None:
            self._open()
        elif not self._leaving:
            for _ in range(self._world.random.randint(1, DEPTH)):
                self._submit(self._device)

    def _open(self) -> None:
        for device in self._host.driver.devices:
            known = device.storage is not None  # else nobody has read from it, nor can tell
            if device.serving and device.size and device.disk == self.disk and known:
                self._device = device
                self._ledger = self.ledgers[str(device.storage)]
                device.openers[self] = None
                return

    def _submit(self, device: KernelDevice) -> None:
        free = [block for block in range(BLOCKS) if block not in self._busy]
        if not free or self._device is not device or self._leaving:
            return
        block = self._world.random.choice(free)
        kinds: tuple[Kind, ...] = ("write", "write", "read", "flush")
        kind = self._world.random.choice(kinds[2:] if device.readonly else kinds)
        ledger = self._ledger
        value = ledger.begin(block) if kind == "write" else 0
        covered = dict(ledger.acknowledged) if kind == "flush" else {}
        self._busy[block] = None

        def done(error: int, found: int) -> None:
            self._done(device, request, error, found)
            if not error:
                ledger.end_flush(covered)

        request = Request(kind, block, value, done, cpu=self._world.random.randrange(8))
        device.submit(request)

    def _done(self, device: KernelDevice, request: Request, error: int, found: int) -> None:
        block = request.block
        del self._busy[block]
        if request.kind == "write":
            self._ledger.end(block, request.value, error)
        elif request.kind == "read" and not error:
            self.check(self._ledger, block, found, "reads")
        if error and not self._leaving and not self._ended:
            self._world.note("%s: error %d on %s", self, error, device.path)
            self._on_error(self.disk, device, error)
            self._leave()

    def check(self, ledger: Ledger, block: int, found: int, how: str) -> None:
        """Complain of a value that cannot be."""
        if self.checked and not ledger.allows(block, found):
            expected = ledger.acknowledged.get(block, 0)
            self._world.violate(
                f"{self} {how} {found} in block {block}, where {expected} was acknowledged"
            )

    def _leave(self) -> None:
        self._leaving = True
        self._world.soon(8.0 if self._world.chance(0.1) else 1.0, self._close)

    def _close(self) -> None:
        device, self._device = self._device, None
        self._leaving = False
        if device is not None:
            device.close(self)

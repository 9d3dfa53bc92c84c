"""What goes wrong, and how often. Each seed has its own mixture."""

from __future__ import annotations

import errno
import os
from collections.abc import Collection
from typing import Final

from tests.simulation.world import World

UNSAVEABLE: Final = "the state cannot be saved"
#: The kinds of faults, and how probable each is where it may strike, at most.
RATES: Final = {
    "the controller dies at a step": 0.06,
    "a worker dies at a step": 0.06,
    "a message is lost": 0.08,
    "a message comes twice": 0.1,
    "no process": 0.3,
    "no socket": 0.2,
    "nothing can be handed over": 0.2,
    UNSAVEABLE: 0.2,
    "a resize is refused": 0.3,
    "a worker is short of memory": 0.2,
    "a worker dies as it boots": 0.2,
    "a worker cannot start": 0.2,
    "no memory to open a disk": 0.0,
    "no memory for what is handed over": 0.2,
    "no memory to refuse what is handed over": 0.1,
    "nothing to detach a device with": 0.2,
    "slow calls": 0.3,
}
#: Of which some strike always while memory or descriptors are short.
SHORTAGES: Final = (
    "no process",
    "no socket",
    "a worker is short of memory",
    "a worker dies as it boots",
    "a worker cannot start",
    "no memory to open a disk",
    "no memory for what is handed over",
    "no memory to refuse what is handed over",
    "nothing to detach a device with",
)
#: Said once, to a worker that is connected, and not waited for without end.
NEVER_LOST: Final = ("shutdown",)


class Faults:
    """The faults of one run; `end` stops them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.short: Collection[str] = ()  # what strikes, as memory or descriptors are
        self.short_core: int | None = None  # ... only in the worker of this one
        self.full = False  # where the state is saved
        self.rates = {
            kind: world.between(0, most) if world.chance(0.4) else 0.0
            for kind, most in RATES.items()
        }

    def __str__(self) -> str:
        return ", ".join(f"{kind} {rate:.3f}" for kind, rate in self.rates.items() if rate)

    def end(self) -> None:
        """Let nothing go wrong any more."""
        self.short, self.short_core, self.full = (), None, False
        self.rates = dict.fromkeys(self.rates, 0.0)

    def strikes(self, kind: str, core: int | None = None) -> bool:
        """Whether this one does now; `core`: of the worker in which it would."""
        if kind in self.short and self.short_core in (None, core):
            return True
        if self.full and kind == UNSAVEABLE:
            return True
        rate = self.rates[kind]
        return bool(rate) and self._world.chance(rate)

    def copies(self, kind: str) -> int:
        """Return how often a message arrives."""
        if kind not in NEVER_LOST and self.strikes("a message is lost"):
            self._world.note("lost: %s", kind)
            return 0
        return 2 if self.strikes("a message comes twice") else 1

    def check(self, kind: str, number: int, core: int | None = None) -> None:
        """Raise OSError if this one strikes."""
        if self.strikes(kind, core):
            self._world.note("fault: %s", kind)
            raise error(number)

    def refuses_resize(self) -> bool:
        """Whether the storage does not change its size."""
        return self.strikes("a resize is refused")

    def call_seconds(self) -> float:
        """Return how long a blocking call takes to begin, or to return."""
        if self.strikes("slow calls"):
            return self._world.between(0, 5)
        return self._world.between(0, 0.02)


NO_PROCESS: Final = errno.EAGAIN
NO_SOCKET: Final = errno.EMFILE
NO_MEMORY: Final = errno.ENOMEM
NO_SPACE: Final = errno.ENOSPC


def error(number: int) -> OSError:
    """Return the error of a number."""
    return OSError(number, os.strerror(number))

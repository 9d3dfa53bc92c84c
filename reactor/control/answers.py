"""Who waits until a disk is what they asked for, and what each is told when it comes to rest."""

from __future__ import annotations

import errno
from typing import Final

from reactor.control.saved import Desired
from reactor.control.service import Done

#: What was done to the disk instead.
DONE: Final = {"online": "started", "stopped": "stopped", "gone": "removed"}


class Answers:
    """The answers that a disk owes."""

    def __init__(self, disk: str) -> None:
        self._disk = disk
        self._owed: list[tuple[Done, Desired | None]] = []

    def owe(self, done: Done, wanted: Desired | None) -> None:
        """Note who waits; None: for something that every disk at rest has done."""
        self._owed.append((done, wanted))

    def take(
        self, desired: Desired, failure: Exception | None, left: Exception | None
    ) -> list[tuple[Done, Exception | None]]:
        """Return all that are owed by a disk at rest.

        `failure`: why it is not online; `left`: why something of a disk that is gone is left.
        """
        owed, self._owed = self._owed, []
        outcome = {"online": failure, "stopped": None, "gone": left}[desired]
        return [
            (done, outcome if wanted in (None, desired) else self._overtaken(wanted, desired))
            for done, wanted in owed
        ]

    def _overtaken(self, wanted: Desired | None, desired: Desired) -> Exception | None:
        if (wanted, desired) == ("stopped", "gone"):
            return None  # it was stopped on its way
        why = f"disk {self._disk} was {DONE[desired]} meanwhile, by another command or the service"
        return OSError(errno.ECANCELED, why)

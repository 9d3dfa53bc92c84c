"""What one of a disk's workers has of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reactor.control.waiting import Waiting
from reactor.control.workers import WorkerProcess
from reactor.spec import Address, DiskSpec


class Share:
    """What one worker has of a disk."""

    def __init__(self, worker: WorkerProcess, clock: Callable[[], int]) -> None:
        self.worker = worker
        self.given_up = ""  # why the disk does without it
        self.rests = False  # ... for now; else until the disk is started again
        self.tried_ns = 0  # when it was last told to open it
        self.waiting = Waiting(clock)  # for what it lacks to do so
        self.opening = False  # it was told to, or how, and has not said what came of it
        self.opened = False  # it has the disk open
        self.size = 0  # bytes of the disk, as it last told
        self.members: list[int] | None = None  # it leads, and gives clients to these cores
        self.listen: tuple[Address, ...] = ()
        self.refusing = False  # it refuses I/O
        self.unheard = ""  # why it leads, and clients find nobody at one of its addresses
        self.statistics: dict[str, int] = {}

    @property
    def lack(self) -> str:
        """Why it has the disk not open, if that is known."""
        return self.given_up or self.waiting.reason

    def take_back(self) -> None:
        """Have it take part again."""
        self.given_up, self.rests = "", False

    def end_silence(self) -> None:
        """Have it take part again, if the disk does without it as it did not answer."""
        if self.opening and self.rests:
            self.take_back()

    def found(self, report: Mapping[str, Any]) -> None:
        """Note what the worker says that it has."""
        self.opened = True
        self.size = report["size"]
        self.members = report["members"] if report["leads"] else None
        self.listen = DiskSpec.from_message(report["spec"]).listen
        self.refusing = report["refusing"]

    def close(self, *, told: bool = False) -> None:
        """Note that the worker has nothing of the disk any more.

        `told`: but to open it, perhaps, which it has yet to answer.
        """
        self.end_silence()  # what hung, or what it may have had of it, has ended
        self.waiting.end()
        self.opening, self.opened = self.opening and told, False
        self.size = 0
        self.members = None
        self.listen = ()
        self.refusing = False
        self.unheard = ""
        self.statistics = {}

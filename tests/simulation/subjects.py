"""What each disk must be in the end, as far as answers and the config say so."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from reactor.spec import AttachWay, DiskSpec
from tests.simulation.application import Application
from tests.simulation.host import Host
from tests.simulation.kernel import KernelDevice

#: With these a command was refused, and nothing is changed.
REFUSED: Final = (errno.EEXIST, errno.EBUSY, errno.EPERM, errno.ENODEV, errno.ESHUTDOWN)
UNSAVED: Final = "cannot be saved for a restart"
UNDONE: Final = "nothing was done"


class Subject:
    """One disk by its name, whether it is there or not."""

    def __init__(self, host: Host, name: str, on_error: Callable[[str, KernelDevice, int], None]):
        random = host.world.random
        self.name = name
        self.backend = random.choice(("malloc", "malloc", "file", "null"))
        self.ways: tuple[AttachWay, ...] = random.choice((("auto",), ("auto",), ("ioctl", "auto")))
        self.paths = random.choice(((f"/{name}",), (f"/{name}", f"/{name}", f"/other/{name}")))
        self.ends: set[str] = {"gone"}  # what it may be in the end
        self.size: int | None = None  # bytes that it must have, None: any
        self.attached: bool | None = None  # it must be on a device, or on none; None: either
        self.device: str | None = None  # which, as the config names it
        self.asking = ""  # what was asked and is not answered
        self.changing = False  # as the config says, and the end of that may not be saved yet
        self.refusable = False  # a change by the config: the disk was in use, perhaps
        self.excused = False  # I/O errors are allowed
        self.excused_at = 0
        self.application = Application(host, name, on_error)
        self.application.checked = self.backend != "null"
        self._host = host
        self._unsaved: int | None = None  # saves when it was changed and that was not saved

    @property
    def forgets(self) -> bool:
        """Whether the data go with the disk."""
        return self.backend == "malloc"

    @property
    def at_risk(self) -> bool:
        """Whether the next controller need not know it as it is: so the operator was told."""
        under_way = bool(self.asking) or self.changing
        return (under_way and self._host.unsaved) or self._unsaved == self._host.saves

    @property
    def keys(self) -> set[str]:
        """The keys of all storage that it may have."""
        return {f"malloc {self.name}", *(f"file {path}" for path in self.paths)}

    def allow_new(self) -> None:
        """Allow that its storage is made, should it be gone."""
        self._host.store.relied_on -= self.keys

    def expect_loss(self) -> None:
        """Allow that its data are gone."""
        self.allow_new()
        if self.forgets:
            self.application.checked = False

    def expect_new(self) -> None:
        """Check its data again, which are new."""
        self.application.checked = self.backend != "null"

    def is_configured(self, spec: DiskSpec | None) -> None:
        """Expect what a service does that knows nothing but the config."""
        self.changing = False
        self.ends = {"online"} if spec is not None else {"gone"}
        self.forget_details()

    def forget_details(self) -> None:
        """Allow any size and device."""
        self.size = self.attached = self.device = None

    def may_be_anything(self) -> None:
        """Expect nothing of a disk whose changes were not saved when the controller died."""
        self.ends |= {"online", "stopped", "removed", "gone"}
        self.forget_details()
        self.expect_loss()
        self._unsaved = None

    def answered(self, error: Exception | str | None) -> bool:
        """Note an answer; returns whether it says that the thing was done."""
        self.asking = ""
        if not isinstance(error, Exception):
            self._unsaved = None
            return True
        if self._host.unsaved and UNDONE not in str(error):
            self._unsaved = self._host.saves
        return is_unsaved(error)


def is_unsaved(error: Exception) -> bool:
    """Whether an answer says that all was done, but may be forgotten."""
    return UNSAVED in str(error)


def is_refusal(error: Exception | str | None) -> bool:
    """Whether an answer says that nothing was changed."""
    return isinstance(error, OSError) and (error.errno in REFUSED or UNDONE in str(error))

"""What was done to a disk that explains a bad end. Nothing else does."""

from __future__ import annotations

from typing import Final

from tests.simulation.world import NS, World

QUICK_DEATHS: Final = 11  # after so many in one life of the controller it gives a core up
ONLINE_SECONDS: Final = 20.0  # a disk that is online so long after a fault has got over it


class Causes:
    """The faults that struck each disk, by what its reason must then say."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._struck: dict[tuple[str, str], int] = {}  # (disk or "" for all, text): when
        self._ever: set[str] = set()
        self._deaths: dict[int, int] = {}  # by core, in this life of the controller
        self._unable: set[int] = set()  # cores whose worker could not start, and was not awaited
        self._unable_since: dict[int, int] = {}  # others: when it first could not

    def strike(self, disk: str, text: str) -> None:
        """Note a fault; an empty `disk` stands for all."""
        self._struck[disk, text] = self._world.now
        self._ever.add(disk)

    def died(self, core: int) -> None:
        """Note the death of a worker that nobody wanted to end."""
        self._deaths[core] = self._deaths.get(core, 0) + 1

    def could_not_start(self, core: int, awaited_seconds: float) -> None:
        """Note that a worker ended since it could not start; devices wait for it for so long."""
        since = self._unable_since.setdefault(core, self._world.now)
        if self._world.now - since >= awaited_seconds * NS:
            self._unable.add(core)

    def came_up(self, core: int) -> None:
        """Note that a worker is there."""
        self._unable_since.pop(core, None)

    def new_controller(self) -> None:
        """Note that the deaths are counted anew."""
        self._deaths.clear()
        self._unable.clear()
        self._unable_since.clear()

    def gave_up(self, core: int) -> bool:
        """Whether a core's workers died so often, or so, that it may be done without."""
        return self._keeps_dying(core) or core in self._unable

    def _keeps_dying(self, core: int) -> bool:
        return self._deaths.get(core, 0) >= QUICK_DEATHS

    def is_online(self, disk: str) -> None:
        """Forget what a disk has got over."""
        for (other, text), when in list(self._struck.items()):
            if other == disk and self._world.now - when > ONLINE_SECONDS * NS:
                del self._struck[other, text]

    def explain(self, disk: str, reason: str) -> bool:
        """Whether a fault of this disk, or of a core that the reason names, led to this end."""
        if any(text in reason for other, text in self._struck if other in ("", disk)):
            return True
        why = [f"worker of core {core} cannot start" for core in self._unable]
        dying = filter(self._keeps_dying, self._deaths)
        why += [f"worker of core {core} keeps dying" for core in dying]
        return any(text in reason for text in why)

    def any_ever(self, disk: str) -> bool:
        """Whether something ever struck the disk, or all."""
        return disk in self._ever or "" in self._ever

    @property
    def any(self) -> bool:
        """Whether some disk may fail."""
        return bool(self._struck or self._unable) or any(map(self._keeps_dying, self._deaths))

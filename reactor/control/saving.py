"""When what the disks should be is saved: before anything is done for it, and for many at once."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from reactor.control.platform import Platform
from reactor.control.saved import SavedState, Wish
from reactor.control.service import UnsavedError
from reactor.errors import reason
from reactor.log import logger

PAUSE_SECONDS_MAX: Final = 1.0

log = logger(__name__)


class Saving:
    """What was saved last. `error`: why the newest could not be, which was said."""

    def __init__(self, platform: Platform, save: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self._platform = platform
        self._save = save
        self._last: SavedState | None = None
        self._waiting: dict[Callable[[], None], None] = {}  # once each
        self._took = 0.0  # seconds, at the last time

    def save(self, state: SavedState) -> None:
        """Save `state`, if that is not done."""
        if not self._try(state) and state != self._last:
            self._platform.outdate()

    def first(self, wish: Wish, state: SavedState) -> None:
        """Save what a disk will be before anybody can rely on it, with what else `state` has.

        Raises OSError when that fails, and then nothing may be done.
        """
        wishes = {each.spec.name: each for each in state.wishes} | {wish.spec.name: wish}
        if not self._try(replace(state, wishes=tuple(wishes.values()))):
            assert self.error is not None
            why = f"nothing was done, as it could not be saved: {reason(self.error)}"
            raise OSError(self.error.errno, why)

    def soon(self, then: Callable[[], None]) -> None:
        """Save once for all that ask for it by then, and go on with `then`.

        With many disks that takes long; it is done no more than half of the time.
        """
        if not self._waiting:
            self._platform.reactor.call_later(self._took, self._save_for_all)
        self._waiting[then] = None

    def outcome(self, error: Exception | None, *, stopping: bool) -> Exception | None:
        """Return what to tell of what ended so: no success that is not known to a later start."""
        overtaken = error is None or getattr(error, "errno", None) == errno.ECANCELED
        if stopping and overtaken:
            return OSError(errno.ESHUTDOWN, "the service stops; it may not be done")
        if error is None and self.error is not None:
            why = f"it is done, but cannot be saved for a restart: {reason(self.error)}"
            return UnsavedError(self.error.errno, why)
        return error

    def _try(self, state: SavedState) -> bool:
        if state == self._last and self.error is None:
            return True
        try:
            self._platform.save(state.encode(self._platform.instance, self._platform.boot))
        except OSError as error:
            if self.error is None:
                log.error("a controller that starts now would not know all: %s", reason(error))
            self.error = error
            return False
        self._last, self.error = state, None
        return True

    def _save_for_all(self) -> None:
        waiting, self._waiting = self._waiting, {}
        clock = self._platform.reactor.clock
        began = clock()
        self._save()
        self._took = min(PAUSE_SECONDS_MAX, (clock() - began) / 1e9)
        for then in waiting:
            then()

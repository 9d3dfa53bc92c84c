"""When what the disks should be is saved: before anything is done for it, and for many at once."""

from __future__ import annotations

from collections.abc import Callable

from reactor.control.platform import Platform
from reactor.control.saved import SavedState
from reactor.errors import reason
from reactor.log import logger

log = logger(__name__)


class Saving:
    """What was saved last. `error`: why the newest could not be, which was said."""

    def __init__(self, platform: Platform, save: Callable[[], None]) -> None:
        self.error: OSError | None = None
        self._platform = platform
        self._save = save
        self._last: SavedState | None = None
        self._waiting: list[Callable[[], None]] = []

    def save(self, state: SavedState) -> None:
        """Save `state`, if that is not done."""
        if state == self._last:
            return
        try:
            self._platform.save(state.encode(self._platform.instance, self._platform.boot))
        except OSError as error:
            if self.error is None:
                log.error("a controller that starts now would not know all: %s", reason(error))
            self.error = error
        else:
            self._last, self.error = state, None

    def soon(self, then: Callable[[], None]) -> None:
        """Save once for all that ask for it in this turn of the loop, and go on with `then`."""
        if not self._waiting:
            self._platform.reactor.call_later(0, self._save_for_all)
        self._waiting.append(then)

    def _save_for_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._save()
        for then in waiting:
            then()

"""What a disk cannot do by itself: FUA by a write and a flush, zeroes by writing them."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Final

from backends.api import (
    COMMAND,
    COOKIE,
    DONE,
    FLAGS,
    Buffer,
    Busy,
    Channel,
    Disk,
    Owner,
    Releasable,
    Request,
)
from reactor.errors import error_number
from reactor.log import logger
from reactor.loop import Reactor
from reactor.protocol.wire import (
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)

WRITE_BYTES: Final = 1 << 20  # zeroes in one write
_ZEROES: Final = memoryview(bytes(WRITE_BYTES))
_CHANGES: Final = frozenset({NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES})

log = logger(__name__)


def open_channel(disk: Disk, reactor: Reactor) -> Channel:
    """Return a channel of `disk` that can do FUA and zeroes."""
    channel = disk.channel(reactor)
    if disk.can_fua and disk.can_write_zeroes:
        return channel
    return EmulationChannel(channel, reactor)


class EmulationChannel(Channel):
    """Passes requests on to `base` as they are, or in steps that it can do."""

    def __init__(self, base: Channel, reactor: Reactor) -> None:
        super().__init__(base.disk)
        self.kick_due = False
        self.base = base
        self._reactor = reactor
        self._ready: deque[_Steps] = deque()  # these can take their next step

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        disk, command, flags = self.disk, request[COMMAND], request[FLAGS]
        fua = bool(flags & NBD_CMD_FLAG_FUA) and not disk.can_fua
        zeroes = command == NBD_CMD_WRITE_ZEROES and not disk.can_write_zeroes
        if not (fua or zeroes):
            return self.base.submit(request, owner)
        if command not in _CHANGES:
            return self.base.submit(_without_fua(request), owner)
        if zeroes and flags & NBD_CMD_FLAG_FAST_ZERO:
            raise OSError(errno.EOPNOTSUPP, "zeroes are written here, which is not fast")
        plain = _without_fua(request) if fua else request
        steps = _written(plain) if zeroes else iter((plain,))
        if fua and disk.can_flush:
            steps = chain(steps, ((NBD_CMD_FLUSH, 0, request[COOKIE], 0, 0, None),))
        return _Steps(self, request, owner, steps).begin()

    def kick(self) -> None:
        """Let every request that can take its next step. One step each: zeroes may be long."""
        ready, self._ready = self._ready, deque()
        for steps in ready:
            steps.go_on()

    def abandon(self, owner: Owner) -> None:
        self.base.abandon(owner)

    def rest(self) -> None:
        self.base.rest()

    def close(self) -> None:
        self.base.close()

    def ready(self, steps: _Steps) -> None:
        """Let `steps` take its next step at the end of a turn."""
        self._ready.append(steps)
        self._reactor.mark_kick(self)


class _Steps(Owner):
    """One request on its way through its steps, which it owns in the base channel."""

    def __init__(
        self, channel: EmulationChannel, request: Request, owner: Owner, steps: Iterator[Request]
    ) -> None:
        self._channel = channel
        self._request = request
        self._owner = owner
        self._steps = steps
        self._step: Request | None = next(steps)

    def begin(self) -> Buffer | None:
        """Take the first two steps, a write and its flush as a rule; the others take turns."""
        for _ in range(2):
            assert self._step is not None
            try:
                done = self._channel.base.submit(self._step, self) is not None
            except Busy:
                self._keep_payload()
                return None
            if not done:
                return None
            self._step = next(self._steps, None)
            if self._step is None:
                return DONE
        self._channel.ready(self)
        return None

    def go_on(self) -> None:
        """Take one step."""
        assert self._step is not None
        try:
            done = self._channel.base.submit(self._step, self) is not None
        except Busy:
            return
        except (OSError, MemoryError) as error:
            self._owner.complete(self._request, error_number(error), DONE)
        except Exception:
            log.exception("disk %s: a bug in its backend", self._channel.disk.name)
            self._owner.complete(self._request, errno.EIO, DONE)
        else:
            if done:
                self._step_done()

    def complete(
        self, request: Request, error: int, data: Buffer, lent: Releasable | None = None
    ) -> None:
        if lent is not None:
            lent.release()
        if error:
            self._owner.complete(self._request, error, DONE)
        else:
            self._step_done()

    def resume(self) -> None:
        self.go_on()

    def _step_done(self) -> None:
        self._step = next(self._steps, None)
        if self._step is None:
            self._owner.complete(self._request, 0, DONE)
        else:
            self._channel.ready(self)

    def _keep_payload(self) -> None:
        """Copy what is valid only until `submit` returns: the base has no room for it yet."""
        assert self._step is not None
        *head, payload = self._step
        if payload is not None:
            command, flags, cookie, offset, length = head
            self._step = (command, flags, cookie, offset, length, memoryview(bytes(payload)))


def _without_fua(request: Request) -> Request:
    command, flags, cookie, offset, length, payload = request
    return (command, flags & ~NBD_CMD_FLAG_FUA, cookie, offset, length, payload)


def _written(request: Request) -> Iterator[Request]:
    """Yield the writes that do the work of a WRITE_ZEROES."""
    _command, flags, cookie, offset, length, _payload = request
    flags &= NBD_CMD_FLAG_FUA
    end = offset + length
    for begin in range(offset, end, WRITE_BYTES):
        size = min(WRITE_BYTES, end - begin)
        yield (NBD_CMD_WRITE, flags, cookie, begin, size, _ZEROES[:size])

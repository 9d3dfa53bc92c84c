"""A requester for channels: submits, waits its turn when refused, and keeps every answer."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable

from backends.api import COOKIE, Buffer, Busy, Channel, Releasable, Request
from reactor.loop import Reactor
from reactor.protocol.wire import NBD_CMD_READ, NBD_CMD_WRITE

DEADLINE_SECONDS = 60.0

Answer = tuple[int, bytes]  # errno and data


class Requester:
    """An owner of requests. With `keep_lent` it gives no buffer back before `give_back`."""

    def __init__(self, reactor: Reactor, channel: Channel, *, keep_lent: bool = False) -> None:
        self.answers: dict[int, Answer] = {}
        self.order: list[int] = []
        self.refusals = 0
        self.pending = 0
        self._reactor = reactor
        self._channel = channel
        self.keep_lent = keep_lent
        self.lent: list[Releasable] = []
        self._submitting = False
        self._refused: deque[Request] = deque()
        self._cookie = 0

    def submit(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes | bytearray = b"",
        flags: int = 0,
    ) -> int:
        """Submit a request; its answer will be in `answers` under the returned cookie."""
        self._cookie += 1
        data = memoryview(payload) if command == NBD_CMD_WRITE else None
        request = (command, flags, self._cookie, offset, length or len(payload), data)
        if self._refused:
            self._refused.append(request)
        else:
            self._try(request)
        return self._cookie

    def do(
        self,
        command: int,
        offset: int = 0,
        length: int = 0,
        payload: bytes | bytearray = b"",
        flags: int = 0,
    ) -> Answer:
        """Submit a request and wait for its answer."""
        cookie = self.submit(command, offset, length, payload, flags)
        self.wait()
        return self.answers[cookie]

    def read(self, offset: int, length: int) -> bytes:
        """Read, successfully."""
        error, data = self.do(NBD_CMD_READ, offset, length)
        assert error == 0, errno.errorcode[error]
        return data

    def write(self, offset: int, payload: bytes, flags: int = 0) -> None:
        """Write, successfully."""
        error, _ = self.do(NBD_CMD_WRITE, offset, 0, payload, flags)
        assert error == 0, errno.errorcode[error]

    def wait(self) -> None:
        """Turn until everything is answered."""
        turn_until(self._reactor, lambda: not self.pending and not self._refused)

    def complete(
        self, request: Request, error: int, data: Buffer, lent: Releasable | None = None
    ) -> None:
        assert not self._submitting, "completed from inside submit"
        self.pending -= 1
        self._answer(request, error, bytes(data))
        if lent is not None:
            self.lent.append(lent)
            if not self.keep_lent:
                self.give_back()

    def resume(self) -> None:
        for _ in range(len(self._refused)):
            if not self._try(self._refused.popleft(), again=True):
                return

    def give_back(self) -> None:
        """Release the oldest lent buffer."""
        self.lent.pop(0).release()

    def _try(self, request: Request, *, again: bool = False) -> bool:
        self._submitting = True
        try:
            data = self._channel.submit(request, self)
        except Busy:
            self.refusals += 1
            if again:
                self._refused.appendleft(request)
            else:
                self._refused.append(request)
            return False
        except OSError as error:
            self._answer(request, error.errno or errno.EIO, b"")
            return True
        finally:
            self._submitting = False
        if data is None:
            self.pending += 1
        else:
            self._answer(request, 0, bytes(data))
        return True

    def _answer(self, request: Request, error: int, data: bytes) -> None:
        cookie = request[COOKIE]
        assert cookie not in self.answers, "answered twice"
        self.answers[cookie] = error, data
        self.order.append(cookie)


def turn_until(reactor: Reactor, condition: Callable[[], object]) -> None:
    """Turn until `condition()`; fails when it does not come."""
    late: list[bool] = []
    timer = reactor.call_later(DEADLINE_SECONDS, lambda: late.append(True))
    while not condition():
        assert not late, "nothing happens"
        reactor.turn()
    timer.cancel()

"""What an RPC method is, and how it answers: at once or later, exactly once, in bounded time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from reactor.control.jsonrpc import (
    INTERNAL_ERROR,
    INVALID_PARAMS,
    CallId,
    RpcError,
    error_reply,
    result_reply,
)
from reactor.control.params import Parameter, decode_params
from reactor.errors import DeviceError, ReactorError, UsageError, reason
from reactor.log import logger
from reactor.loop import Reactor, Timer

#: SPDK's client gives up after 60 s; it should hear why before that.
ANSWER_SECONDS: Final = 55.0

log = logger(__name__)


class Reply:
    """The answer to one call. `send` gets it encoded, or None when there is nothing to say."""

    def __init__(
        self, reactor: Reactor, call_id: CallId, send: Callable[[Reply, bytes | None], None]
    ) -> None:
        self.reactor = reactor
        self.waiting = True  # not answered, and somebody is there to hear it
        self._id = call_id
        self._send = send
        self._deadline: Timer | None = None

    def result(self, value: Any) -> None:
        """Answer with a result."""
        if not self.waiting:
            return
        try:
            encoded = result_reply(self._id, value)
        except RpcError as error:
            encoded = error_reply(self._id, error)
        except (TypeError, ValueError):
            log.exception("an RPC result cannot be encoded")
            encoded = error_reply(self._id, RpcError(INTERNAL_ERROR, "Internal error"))
        else:
            if self._id is None:
                self._answer(None)  # a notification that succeeded
                return
        self._answer(encoded)

    def fail(self, error: Exception) -> None:
        """Answer with a failure; also when the call was a notification."""
        if self.waiting:
            self._answer(error_reply(self._id, rpc_error(error)))

    def done(self, result: Any) -> Callable[[Exception | None], None]:
        """Return a `Done` that answers `result`, or its error."""

        def answer(error: Exception | None) -> None:
            if error is None:
                self.result(result)
            else:
                self.fail(error)

        return answer

    def expire_after(self, seconds: float) -> None:
        """Answer with ETIMEDOUT unless the method answers within `seconds`."""
        self._deadline = self.reactor.call_later(seconds, self._expire)

    def abandon(self) -> None:
        """Nobody is there any more to hear the answer."""
        self.waiting = False
        if self._deadline is not None:
            self._deadline.cancel()

    def _expire(self) -> None:
        self.fail(RpcError(-errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))

    def _answer(self, encoded: bytes | None) -> None:
        self.abandon()
        self._send(self, encoded)


@dataclass(frozen=True, slots=True)
class Method:
    """An RPC method. It answers through its `Reply`, or raises RpcError at once."""

    function: Callable[[dict[str, Any], Reply], None]
    parameters: tuple[Parameter, ...] = ()
    #: What SPDK answers to parameters that cannot be decoded; None: say what is wrong with them.
    failure: tuple[int, str] | None = None
    #: SPDK finishes it before it looks at the next request, so a client may rely on its effect in
    #: what it sends behind it: nothing behind it starts before it has answered.
    barrier: bool = False
    #: Seconds until the client is answered ETIMEDOUT; None: the method sees to it.
    deadline: float | None = ANSWER_SECONDS

    def call(self, params: Any, reply: Reply) -> None:
        """Decode `params` and run; whatever goes wrong is answered."""
        try:
            self.function(self._decode(params), reply)
        except RpcError as error:
            reply.fail(error)
        except Exception as error:  # noqa: BLE001 - a bug in one method must not end the service
            reply.fail(error)
        if reply.waiting and self.deadline is not None:
            reply.expire_after(self.deadline)

    def _decode(self, params: Any) -> dict[str, Any]:
        # With nothing to decode SPDK wants nothing, not even an empty object.
        if self.failure is not None and not self.parameters and params is not None:
            raise RpcError(*self.failure)
        try:
            return decode_params(self.parameters, params)
        except ValueError as error:
            if self.failure is not None:
                log.debug("parameters refused: %s", error)
                raise RpcError(*self.failure) from None
            raise RpcError(INVALID_PARAMS, str(error)) from None


def rpc_error(error: Exception) -> RpcError:
    """Return what a client is told about `error`; a bug is logged and shown as one."""
    if isinstance(error, RpcError):
        return error
    if isinstance(error, UsageError):
        return RpcError(INVALID_PARAMS, reason(error))
    if isinstance(error, OSError | DeviceError) and error.errno:
        return RpcError(-error.errno, reason(error))
    if isinstance(error, ReactorError):
        return RpcError(INTERNAL_ERROR, reason(error))
    log.error("an RPC method failed", exc_info=error)
    return RpcError(INTERNAL_ERROR, "Internal error")

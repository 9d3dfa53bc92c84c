"""What SPDK's method families have in common: their error codes and texts."""

from __future__ import annotations

import errno
import os
from typing import Any, Final

from reactor.control.call import Reply
from reactor.control.jsonrpc import INTERNAL_ERROR, INVALID_PARAMS, RpcError
from reactor.control.service import Done, UnsavedError
from reactor.errors import DeviceError, reason
from reactor.log import logger

#: What its families answer to parameters that cannot be decoded.
DECODE_FAILED: Final = (INTERNAL_ERROR, "spdk_json_decode_object failed")
INVALID: Final = (INVALID_PARAMS, "Invalid parameters")

log = logger(__name__)


def failure(number: int) -> RpcError:
    """Return SPDK's usual failure: the negative errno and its text."""
    return RpcError(-number, os.strerror(number))


def spdk_error(error: Exception) -> Exception:
    """Return `error` in SPDK's words; what they leave out is logged."""
    if not isinstance(error, OSError | DeviceError) or not error.errno:
        return error
    if isinstance(error, DeviceError) and error.errno != errno.EBUSY:
        return error  # why a device cannot be attached is more than its errno tells
    if isinstance(error, UnsavedError):
        return error  # or it would tell that nothing was done
    told = failure(error.errno)
    log.info("RPC fails: %s", reason(error))
    return told


def done(reply: Reply, result: Any) -> Done:
    """Return a `Done` that answers `result`, or its error in SPDK's words."""

    def answer(error: Exception | None) -> None:
        if error is None:
            reply.result(result)
        else:
            reply.fail(spdk_error(error))

    return answer

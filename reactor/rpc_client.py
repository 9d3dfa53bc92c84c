"""The client's end of the RPC socket: one call at a time, in bounded time."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from reactor.errors import ReactorError, reason

ANSWER_MAX: Final = 33 << 20  # bytes; the service sends no result of more than 32 MiB
RECEIVE_BYTES: Final = 1 << 16


class RpcClient:
    """A connection; `timeout` (s) is for all that is done with it. Raises ReactorError."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._sock = socket.socket(socket.AF_UNIX)
        try:
            self._wait_at_most()
            self._sock.connect(os.fspath(path))
        except OSError as error:
            self._sock.close()
            raise ReactorError(_why_not_connected(path, error)) from error

    def __enter__(self) -> RpcClient:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._sock.close()

    @property
    def seconds_left(self) -> float:
        """How much of the timeout is left."""
        return self._deadline - time.monotonic()

    def call(self, method: str, params: Any = None) -> Any:
        """Return the method's result."""
        request = {"jsonrpc": "2.0", "id": 1, "method": method}
        if params is not None:
            request["params"] = params
        try:
            self._sock.sendall(json.dumps(request).encode())
        except BrokenPipeError:
            pass  # it may have said why before it closed
        except TimeoutError as error:
            raise self._too_late() from error
        return self._result(method, self._receive())

    def _receive(self) -> bytes:
        answer = bytearray()
        while not answer.endswith(b"\n"):  # within an answer every newline is escaped
            try:
                self._wait_at_most()
                part = self._sock.recv(RECEIVE_BYTES)
            except TimeoutError as error:
                raise self._too_late() from error
            if not part:
                raise ReactorError("the service closed the connection without an answer")
            answer += part
            if len(answer) > ANSWER_MAX:
                raise ReactorError(f"the answer is larger than {ANSWER_MAX} bytes")
        return bytes(answer)

    def _result(self, method: str, text: bytes) -> Any:
        try:
            answer = json.loads(text)
            if "error" not in answer:
                return answer["result"]
            message = answer["error"]["message"]
        except (ValueError, TypeError, KeyError) as error:
            raise ReactorError(f"{method}: what answered is no JSON-RPC service") from error
        raise ReactorError(f"{method}: {message}")

    def _wait_at_most(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._too_late()
        self._sock.settimeout(left)

    def _too_late(self) -> ReactorError:
        return ReactorError(f"the service did not answer within {self._timeout:g} s")


def _why_not_connected(path: Path, error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"no service at {path}; is nbd-reactor running? (--socket names another)"
    if isinstance(error, ConnectionRefusedError):
        return f"no service at {path} any more; is nbd-reactor running?"
    if isinstance(error, PermissionError):
        return f"{path}: permission denied; it is for the service's own user"
    return f"{path}: {reason(error)}"

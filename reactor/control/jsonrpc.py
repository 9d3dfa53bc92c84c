"""JSON-RPC 2.0 as SPDK speaks it, sans-I/O: a stream of bytes to calls, results to bytes.

There is no framing: each message is the next complete JSON value of the stream.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

PARSE_ERROR: Final = -32700
INVALID_REQUEST: Final = -32600
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603

MESSAGE_MAX: Final = 256 << 10  # bytes
NESTING_MAX: Final = 64  # arrays and objects within each other; bounds the parser's recursion
RESPONSE_MAX: Final = 32 << 20  # bytes

CallId: TypeAlias = str | int | float | None

_WHITESPACE: Final = re.compile(rb"[ \t\r\n]*")
_MARK: Final = re.compile(rb'["\[\]{}]')  # what changes the depth outside of a string
_STRING_END: Final = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_SCALAR: Final = re.compile(rb"[-+.0-9A-Za-z]*")
_SCALAR_BEGUN: Final = re.compile(rb"-?\d[-+.0-9eE]*|-|t(r(ue?)?)?|f(a(l(se?)?)?)?|n(u(ll?)?)?")
_QUOTE, _OPENING = ord('"'), b"[{"


class RpcError(Exception):
    """What a call is answered when it fails."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class StreamError(Exception):
    """The stream is not JSON, or a message is too large; nothing after it can be understood."""


class Repeated:
    """Stands for an object in which a key came twice: no parameter accepts it."""

    def __repr__(self) -> str:
        return "an object with a repeated key"


REPEATED: Final = Repeated()
INCOMPLETE: Final = object()  # the next value has not arrived as a whole


@dataclass(frozen=True, slots=True)
class Call:
    """A request: `params` is an object, an array, None or `REPEATED`."""

    method: str
    params: Any
    id: CallId  # None: a notification, whose success is not answered


class Decoder:
    """Cuts a stream into JSON values. Every byte is looked at once, however it is fragmented."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begin = 0  # of the value being read
        self._position = 0  # everything before is scanned
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> None:
        """Append what was received."""
        del self._buffer[: self._begin]
        self._position -= self._begin
        self._begin = 0
        self._buffer += data

    @property
    def pending(self) -> int:
        """Bytes that are kept."""
        return len(self._buffer) - self._begin

    def next(self) -> Any:
        """Return the next value or `INCOMPLETE`; raises StreamError."""
        if not self._depth and not self._in_string:
            self._skip_whitespace()
        end = self._find_end()
        if end < 0:
            if self.pending >= MESSAGE_MAX:
                raise StreamError(f"Message of more than {MESSAGE_MAX} bytes")
            return INCOMPLETE
        if end - self._begin > MESSAGE_MAX:
            raise StreamError(f"Message of more than {MESSAGE_MAX} bytes")
        text = bytes(self._buffer[self._begin : end])
        self._begin = self._position = end
        return parse(text)

    def _skip_whitespace(self) -> None:
        match = _WHITESPACE.match(self._buffer, self._begin)
        assert match is not None
        self._begin = self._position = match.end()

    def _find_end(self) -> int:
        """Return where the value ends, or -1."""
        buffer = self._buffer
        if self._in_string and not self._end_string():
            return -1
        if self._position == self._begin < len(buffer) and buffer[self._begin] not in b'"[{':
            return self._scalar_end()
        while self._depth or self._position == self._begin:
            mark = _MARK.search(buffer, self._position)
            if mark is None:
                self._position = len(buffer)
                return -1
            self._position = mark.end()
            if buffer[mark.start()] == _QUOTE:
                self._in_string = True
                if not self._end_string():
                    return -1
            else:
                self._depth += 1 if buffer[mark.start()] in _OPENING else -1
                if self._depth > NESTING_MAX:
                    raise StreamError("Parse error")
        return self._position

    def _end_string(self) -> bool:
        match = _STRING_END.match(self._buffer, self._position)
        if match is not None:
            self._position = match.end()
            self._in_string = False
            return True
        # Go on behind the last whole character; a lone backslash needs the next byte.
        escaped = len(self._buffer)
        while escaped > self._position and self._buffer[escaped - 1] == 0x5C:
            escaped -= 1
        self._position = len(self._buffer) - (len(self._buffer) - escaped) % 2
        return False

    def _scalar_end(self) -> int:
        # No request is a scalar: it only has to be told from garbage, and skipped.
        match = _SCALAR.match(self._buffer, self._begin)
        assert match is not None
        if match.end() < len(self._buffer) and match.group():
            return match.end()
        if len(match.group()) > 64 or not _SCALAR_BEGUN.fullmatch(match.group()):
            raise StreamError("Parse error")
        return -1


def parse(text: bytes) -> Any:
    """Return the JSON value `text`; raises StreamError when it is not strictly JSON."""
    try:
        return json.loads(
            text.decode(),
            object_pairs_hook=_object,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except (ValueError, RecursionError) as error:
        raise StreamError("Parse error") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Repeated:
    unique = dict(pairs)
    return unique if len(unique) == len(pairs) else REPEATED


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"{text} is out of range")
    return value


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def request(value: Any) -> Call:
    """Return the call that `value` asks for; raises RpcError when it is not a request object."""
    if not isinstance(value, dict) or not value.keys() <= {"jsonrpc", "method", "params", "id"}:
        raise RpcError(INVALID_REQUEST, "Invalid request")
    call_id, method, params = value.get("id"), value.get("method"), value.get("params")
    well_formed = (
        value.get("jsonrpc", "2.0") == "2.0"
        and isinstance(method, str)
        and isinstance(params, dict | list | Repeated | None)
        and isinstance(call_id, str | int | float | None)
        and not isinstance(call_id, bool)
    )
    if not well_formed:
        raise RpcError(INVALID_REQUEST, "Invalid request")
    assert isinstance(method, str)
    return Call(method, params, call_id)


def result_reply(call_id: CallId, result: Any) -> bytes:
    """Encode a result; raises RpcError when it is larger than SPDK's client would be sent."""
    reply = _encode({"jsonrpc": "2.0", "id": call_id, "result": result})
    if len(reply) > RESPONSE_MAX:
        raise RpcError(INTERNAL_ERROR, f"The result is larger than {RESPONSE_MAX} bytes")
    return reply


def error_reply(call_id: CallId, error: RpcError) -> bytes:
    """Encode a failure."""
    failure = {"code": error.code, "message": error.message}
    return _encode({"jsonrpc": "2.0", "id": call_id, "error": failure})


def _encode(reply: dict[str, Any]) -> bytes:
    # Pure ASCII: SPDK's client drops a chunk that ends within a UTF-8 character.
    return json.dumps(reply, separators=(",", ":"), allow_nan=False).encode("ascii")

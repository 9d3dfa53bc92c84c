"""The parameters of RPC methods: one table per method, decoded as strictly as SPDK does."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from reactor.control.jsonrpc import REPEATED
from reactor.errors import quoted


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter: `decode` converts its value, or raises ValueError that says what it must be."""

    name: str
    decode: Callable[[Any], Any]
    required: bool = True


def decode_params(table: tuple[Parameter, ...], params: Any) -> dict[str, Any]:
    """Return the given parameters, converted; raises ValueError in words for a person."""
    if params is None:
        params = {}
    if params is REPEATED:
        raise ValueError("a parameter is given twice")
    if isinstance(params, list):
        raise ValueError("parameters must be an object")  # noqa: TRY004 - as every wrong value
    decoders = {parameter.name: parameter.decode for parameter in table}
    for name in params:
        if name not in decoders:
            known = ", ".join(decoders) or "none"
            raise ValueError(f"unknown parameter {quoted(name)}; there are: {known}")
    for parameter in table:
        if parameter.required and parameter.name not in params:
            raise ValueError(f"parameter {parameter.name} is missing")
    return {name: _decode_one(name, decoders[name], value) for name, value in params.items()}


def _decode_one(name: str, decode: Callable[[Any], Any], value: Any) -> Any:
    try:
        return decode(value)
    except ValueError as error:
        raise ValueError(f"parameter {name} must be {error}") from None


def string(value: Any) -> str:
    """Decode a string that an operating system call can take."""
    if isinstance(value, str) and "\0" not in value:
        try:
            value.encode()
        except UnicodeEncodeError:  # half of a surrogate pair, as in "\ud800"
            pass
        else:
            return value
    raise ValueError("a string")


def boolean(value: Any) -> bool:
    """Decode true or false."""
    if isinstance(value, bool):
        return value
    raise ValueError("true or false")


def integer(minimum: int, maximum: int) -> Callable[[Any], int]:
    """Return a decoder of whole numbers from `minimum` to `maximum`; 1e3 is one."""

    def decode(value: Any) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum:
            return value
        raise ValueError(f"a whole number from {minimum} to {maximum}")

    return decode


U32: Final = integer(0, (1 << 32) - 1)
U64: Final = integer(0, (1 << 64) - 1)
I32: Final = integer(-(1 << 31), (1 << 31) - 1)


def unique_id(value: Any) -> str:
    """Decode a UUID in its usual form; returned in lower case."""
    text = string(value).lower()
    try:
        if str(uuid.UUID(text)) == text:  # Python takes other forms too
            return text
    except ValueError:
        pass
    raise ValueError("a UUID")


def mapping(value: Any) -> dict[str, Any]:
    """Decode an object."""
    if isinstance(value, dict):
        return value
    raise ValueError("an object")

"""The exceptions that cross module boundaries.

Every message is one complete line for the operator: what failed, where, and what to do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from typing import Final

#: What is wanting now, and may be there later.
SHORTAGES: Final = (errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ENOBUFS)
QUOTED_MAX: Final = 80  # characters of foreign text in a message


class ReactorError(Exception):
    """A failure at run time that the operator can act on (exit status 1)."""


class UsageError(ReactorError):
    """Wrong usage or config (exit status 2)."""


class ConfigError(UsageError):
    """A config that cannot be used; `problems` are complete lines, in the order of the file."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(self.problems))


class ProtocolError(Exception):
    """The peer broke the NBD protocol and the stream cannot be trusted any more."""


class BusError(ReactorError):
    """A control message that is malformed, too large or of another version."""


class DeviceError(ReactorError):
    """A kernel device could not be attached, changed or detached; `errno` says why."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = number


def error_number(error: BaseException) -> int:
    """Return the errno for `error`: EIO for what has none."""
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    number = error.errno if isinstance(error, OSError | DeviceError) else None
    return number or errno.EIO


def is_shortage(error: BaseException) -> bool:
    """Whether nothing is wrong but that there is no memory, or no descriptor, now."""
    return error_number(error) in SHORTAGES


def reason(error: BaseException) -> str:
    """Return one line that says what `error` means, without Python's decoration."""
    if isinstance(error, OSError) and error.errno is not None:
        text = os.strerror(error.errno)
        # An OSError that our own code raised may carry a better text than the errno's.
        if error.strerror and error.strerror != text:
            text = error.strerror
        return f"{error.filename}: {text}" if error.filename else text
    if isinstance(error, MemoryError):
        return os.strerror(errno.ENOMEM)
    return " ".join(str(error).split()) or type(error).__name__


def quoted(text: str) -> str:
    """Return foreign text in quotes, fit for a line of a message: escaped, and cut if long."""
    if len(text) > QUOTED_MAX:
        text = text[:QUOTED_MAX] + "…"
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text) + '"'

"""Sizes and times as people write them."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

from reactor.errors import quoted

SIZE_MAX: Final = (1 << 63) - 1  # bytes; the kernel's loff_t
SECONDS_MAX: Final = 7 * 24 * 3600.0  # a longer time is a mistake

# qemu's letters are powers of 1024. KB and its like mean 1000 to some and are refused.
_EXPONENTS: Final = {"": 0, "b": 0} | {
    suffix: exponent
    for exponent, letter in enumerate("kmgt", start=1)
    for suffix in (letter, f"{letter}ib")
}
_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")
_PER_SECOND: Final = {"": 1, "s": 1, "ms": 1_000, "us": 1_000_000}

# The bounds on digits keep the arithmetic small, whatever the text.
_SIZE: Final = re.compile(r"(-?)(\d{1,30}(?:\.\d{1,30})?) ?([A-Za-z]*)", re.ASCII)
_TIME: Final = re.compile(r"(-?)(\d{1,30}(?:\.\d{1,30})?(?:e[+-]?\d{1,3})?) ?([a-z]*)", re.ASCII)

#: What is written as a size or time, to one who knows only regular expressions (ECMA 262).
SIZE_PATTERN: Final = r"^[0-9]{1,30}([.][0-9]{1,30})? ?([KMGTkmgt]([Ii][Bb])?|[Bb])?$"
TIME_PATTERN: Final = r"^[0-9]{1,30}([.][0-9]{1,30})?(e[+-]?[0-9]{1,3})? ?(s|ms|us)?$"


def parse_size(text: str) -> int:
    """Return the bytes in `text`, from 0 to `SIZE_MAX`; raises ValueError that says what is wrong.

    Understood are whole numbers of bytes and numbers with KiB, MiB, GiB, TiB or k, M, G, T.
    """
    match = _SIZE.fullmatch(text)
    exponent = _EXPONENTS.get(match[3].lower()) if match else None
    if match is None or exponent is None:
        raise ValueError(
            f"{quoted(text)} is not a size; write bytes, or a number with KiB, MiB, GiB or TiB"
        )
    if match[1]:
        raise ValueError(f"{text} is negative; a size is not")
    size = Fraction(match[2]) * 1024**exponent
    if size.denominator != 1:
        raise ValueError(f"{text} is not a whole number of bytes")
    if size > SIZE_MAX:
        raise ValueError(f"{text} is more than the largest size, {SIZE_MAX} bytes")
    return int(size)


def format_size(size: int) -> str:
    """Return `size` (bytes) for people: at most two decimals in the largest unit that fits."""
    number, unit = float(size), _UNITS[0]
    for larger in _UNITS[1:]:
        if round(number, 2) < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:.2f}".rstrip("0").rstrip(".") + unit


def format_exact_size(size: int) -> str:
    """Return `size` (bytes) as a whole number of its largest unit; `parse_size` reads it back."""
    unit = 0
    while size and size % 1024 == 0 and unit < len(_UNITS) - 1:
        size, unit = size // 1024, unit + 1
    return f"{size}{_UNITS[unit]}" if unit else str(size)


def parse_seconds(text: str) -> float:
    """Return the seconds in `text`, from 0 to `SECONDS_MAX`; raises ValueError that says why not.

    Understood are numbers of seconds and numbers with s, ms or us.
    """
    match = _TIME.fullmatch(text)
    per_second = _PER_SECOND.get(match[3]) if match else None
    if match is None or per_second is None:
        raise ValueError(f"{quoted(text)} is not a time; write seconds, or a number with ms or us")
    if match[1]:
        raise ValueError(f"{text} is negative; a time is not")
    seconds = float(match[2]) / per_second  # dividing rounds once: 2ms is exactly 0.002
    if seconds > SECONDS_MAX:
        raise ValueError(f"{text} is more than the longest time, {SECONDS_MAX:.0f} s (7 days)")
    return seconds

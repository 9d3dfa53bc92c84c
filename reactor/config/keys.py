"""What the value of each key must be."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Final, TypeAlias, get_args

from reactor.config.document import Value, describe
from reactor.config.problems import unknown
from reactor.errors import quoted
from reactor.spec import NAME_MAX, Address, AttachWay, DiskSpec, KeyKind
from reactor.units import (
    SECONDS_MAX,
    SIZE_MAX,
    SIZE_PATTERN,
    TIME_PATTERN,
    parse_seconds,
    parse_size,
)

BLOCK_SIZE_MIN: Final = 512
BLOCK_SIZE_MAX: Final = 65536
DEVICE_BLOCK_SIZE_MAX: Final = 4096  # the page size: drivers/block/nbd.c, nbd_set_size
CONNECTIONS_MAX: Final = 16
DEVICE_INDEX_MAX: Final = (1 << 20) - 1  # MINORMASK
LISTEN_MAX: Final = 16  # addresses of a disk
TEXT_MAX: Final = 4095  # bytes: PATH_MAX without its NUL

#: Returns the converted value or raises ValueError that says what is wrong with it.
Converter: TypeAlias = Callable[[Value], object]


@dataclass(frozen=True, slots=True)
class Kind:
    """What a value must be: for the reader, and as much as a JSON schema can say of it."""

    read: Converter
    schema: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class CommonKey:
    """A key of every disk; `meaning` and `default` are for people, with `code` as in Markdown."""

    kind: Kind
    meaning: str
    default: str


NAME: Final = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*", re.ASCII)
_DEVICE: Final = re.compile(r"/dev/nbd(0|[1-9][0-9]{0,6})", re.ASCII)
_ADDRESS_PATTERN: Final = "^(unix:/.+|tcp:.+:[0-9]+|systemd:.+)$"
_WHOLE: Final = re.compile(r"-?[0-9]{1,18}", re.ASCII)


def text(value: Value, *, kind: str) -> str:
    """Return text; `kind` says of what."""
    if not isinstance(value, str) or not value:
        hint = "; put it in quotes if it is meant" if isinstance(value, bool) else ""
        raise ValueError(f"expected {kind}, found {describe(value)}{hint}")
    try:
        length = len(value.encode())
    except UnicodeEncodeError:
        raise ValueError(f"{quoted(value)} is not Unicode text") from None
    if length > TEXT_MAX or "\0" in value:
        raise ValueError(f"expected {kind} of at most {TEXT_MAX} bytes without NUL")
    return value


def size(value: Value) -> int:
    """Return bytes."""
    return parse_size(text(value, kind="a size"))


def seconds(value: Value) -> float:
    """Return seconds."""
    return parse_seconds(text(value, kind="a time"))


def boolean(value: Value) -> bool:
    """Return true or false; the words may be quoted, as they are on a command line."""
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value
    raise ValueError(f"expected true or false, found {describe(value)}")


def integer(value: Value, *, low: int | None = None, high: int | None = None) -> int:
    """Return a whole number within the bounds."""
    if not isinstance(value, str) or not _WHOLE.fullmatch(value):
        raise ValueError(f"expected a whole number, found {describe(value)}")
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise ValueError(f"{number} is out of range; it goes from {low} to {high}")
    return number


def disk_name(value: Value) -> str:
    """Return a name that fits a file name, an NBD export and a line of a log."""
    name = text(value, kind="a disk's name")
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{quoted(name)} is not a disk's name: it has letters, digits and . _ -,"
            " and does not begin with a dot"
        )
    if len(name) > NAME_MAX:
        raise ValueError(f"a disk's name is not longer than {NAME_MAX} characters")
    return name


def _device(value: Value) -> str:
    path = text(value, kind="a device")
    match = _DEVICE.fullmatch(path)
    if path != "auto" and (match is None or int(match[1]) > DEVICE_INDEX_MAX):
        raise ValueError(f"{quoted(path)} is not a device; write /dev/nbdN or auto")
    return path


def _listen(value: Value) -> tuple[Address, ...]:
    items = value if isinstance(value, list) else [value]
    if len(items) > LISTEN_MAX:
        raise ValueError(f"{len(items)} addresses; a disk has at most {LISTEN_MAX}")
    addresses: list[Address] = []
    for item in items:
        address = _address(text(item, kind="an address or a list of addresses"))
        if address in addresses:
            raise ValueError(f"{address} is given twice")
        addresses.append(address)
    return tuple(addresses)


def _address(written: str) -> Address:
    if not written.isprintable():  # it is shown on one line, and handed to clients
        raise ValueError(f"{quoted(written)}: an address has only printable characters")
    try:
        return Address.parse(written)
    except ValueError as error:
        raise ValueError(f"{quoted(written)}: {error}") from None


def _core(value: Value) -> int:
    number = integer(value)
    if number < 0:
        raise ValueError(f"{number} is not a core; they are numbered from 0")
    return number


def _block_size(value: Value) -> int:
    number = parse_size(text(value, kind="a block size"))
    if not BLOCK_SIZE_MIN <= number <= BLOCK_SIZE_MAX or number & (number - 1):
        raise ValueError(
            f"{number} is not a power of two from {BLOCK_SIZE_MIN} to {BLOCK_SIZE_MAX}"
        )
    return number


def _whole_seconds(value: Value) -> int:
    number = seconds(value)
    if not number.is_integer():
        raise ValueError(f"{number:g} s is not a whole number of seconds, as the kernel needs")
    return int(number)


def _attach(value: Value) -> str:
    way = text(value, kind="a way to attach")
    if way not in get_args(AttachWay):
        raise ValueError(unknown("way", way, get_args(AttachWay)))
    return way


def _words(kind: str) -> Kind:
    return Kind(partial(text, kind=kind), {"type": "string", "minLength": 1})


_SIZE: Final = {"type": ["integer", "string"], "maximum": SIZE_MAX, "pattern": SIZE_PATTERN}
_TIME: Final = {"minimum": 0, "maximum": SECONDS_MAX, "pattern": TIME_PATTERN}
_WHOLE_SECONDS: Final = Kind(_whole_seconds, {"type": ["integer", "string"], **_TIME})
_BOOLEAN: Final = Kind(boolean, {"enum": [True, False, "true", "false"]})
_ADDRESS: Final = {"type": "string", "pattern": _ADDRESS_PATTERN}
_POWERS: Final = [
    1 << bits for bits in range(BLOCK_SIZE_MIN.bit_length() - 1, BLOCK_SIZE_MAX.bit_length())
]

REQUIRED: Final = "required"
_DEFAULTS: Final = {field.name: field.default for field in fields(DiskSpec)}

#: The keys of every disk, but for the backend's own.
COMMON: Final[Mapping[str, CommonKey]] = {
    "backend": CommonKey(
        _words("a backend"),
        "its type",
        REQUIRED,
    ),
    "device": CommonKey(
        Kind(_device, {"type": "string", "pattern": f"^(auto|{_DEVICE.pattern})$"}),
        "`/dev/nbdN`, or `auto` for the first free one",
        "none",
    ),
    "listen": CommonKey(
        Kind(
            _listen,
            {
                "anyOf": [
                    _ADDRESS,
                    {
                        "type": "array",
                        "items": _ADDRESS,
                        "maxItems": LISTEN_MAX,
                        "uniqueItems": True,
                    },
                ]
            },
        ),
        "one address or a list: `unix:PATH`, `tcp:HOST:PORT`, `systemd:NAME` (socket activation);"
        " a listener's only disk is also its default export",
        "none",
    ),
    "core": CommonKey(
        Kind(_core, {"type": "integer", "minimum": 0}),
        "the core whose worker owns the disk",
        "the least loaded",
    ),
    "readonly": CommonKey(
        _BOOLEAN,
        "refuse writes, trims and zeroes with EPERM",
        "`false`",
    ),
    "block_size": CommonKey(
        Kind(
            _block_size,
            {"anyOf": [{"enum": _POWERS}, {"type": "string", "pattern": SIZE_PATTERN}]},
        ),
        f"logical block size in bytes, a power of two; {BLOCK_SIZE_MIN} to"
        f" {DEVICE_BLOCK_SIZE_MAX} for a device",
        f"the backend's, else {BLOCK_SIZE_MIN}",
    ),
    "connections": CommonKey(
        Kind(
            partial(integer, low=1, high=CONNECTIONS_MAX),
            {"type": "integer", "minimum": 1, "maximum": CONNECTIONS_MAX},
        ),
        "sockets between the kernel and the workers, at most one per CPU is used; above 1, the"
        " disk is spread over several cores",
        str(_DEFAULTS["connections"]),
    ),
    "timeout": CommonKey(
        _WHOLE_SECONDS,
        "seconds after which the kernel ends the connection of a request that is not answered; 0"
        " never, but 10 with several connections by netlink. By netlink it sends the request"
        " again, on another connection or on the next, where it waits until the first copy has"
        " ended; by ioctl the request fails, and the device with it",
        "0 by netlink, 60 by ioctl; 10 with several connections by netlink",
    ),
    "dead_timeout": CommonKey(
        _WHOLE_SECONDS,
        "seconds for which the kernel holds new I/O while no worker serves the device; what is in"
        " flight it holds until one does, unless there is a `timeout`",
        str(_DEFAULTS["dead_timeout"]),
    ),
    "attach": CommonKey(
        Kind(_attach, {"enum": [*get_args(AttachWay)]}),
        "`netlink`, `ioctl`, or `auto`: netlink where the kernel has it",
        f"`{_DEFAULTS['attach']}`",
    ),
}

#: The kinds of a backend's keys.
KINDS: Final[Mapping[KeyKind, Kind]] = {
    "size": Kind(size, {**_SIZE, "minimum": 1}),
    "seconds": Kind(seconds, {"type": ["number", "string"], **_TIME}),
    "boolean": _BOOLEAN,
    "integer": Kind(integer, {"type": "integer"}),
    "path": _words("a path"),
    "string": _words("text"),
    "disk": Kind(disk_name, {"type": "string", "pattern": f"^{NAME.pattern}$"}),
}

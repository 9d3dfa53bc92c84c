"""What a disk should be: the one description that config, RPC, bus and workers share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from hashlib import sha256
from ipaddress import ip_address
from typing import Any, Final, Literal, TypeAlias

AttachWay: TypeAlias = Literal["auto", "netlink", "ioctl"]
KeyKind: TypeAlias = Literal["size", "seconds", "boolean", "integer", "path", "string", "disk"]

NAME_MAX: Final = 128  # characters in a disk's name
UNIX_PATH_MAX: Final = 107  # bytes in a socket's path (struct sockaddr_un)


@dataclass(frozen=True, slots=True)
class Key:
    """A key of disks.yaml that a backend adds, and what its value must be.

    Values arrive converted: `size` as bytes, `seconds` as float, `disk` as another disk's name.
    `meaning` is for people, with `code` marked as in Markdown.
    """

    name: str
    kind: KeyKind
    required: bool = False
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class BackendSchema:
    """What a config must know of a backend; see `backends.api.Backend`."""

    keys: tuple[Key, ...]
    can_multi_conn: bool
    check: Callable[[Mapping[str, object], int | None], list[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Address:
    """Where a disk is served: `unix:PATH`, `tcp:HOST:PORT` or `systemd:NAME`."""

    kind: Literal["unix", "tcp", "systemd"]
    target: str  # a path, a host or a name
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """Parse the text form; raises ValueError that says what is wrong."""
        kind, colon, target = text.partition(":")
        if kind == "unix" and target:
            if len(target.encode()) > UNIX_PATH_MAX:
                raise ValueError(f"the path is longer than {UNIX_PATH_MAX} bytes")
            if not target.startswith("/"):
                raise ValueError("the path must be absolute")
            return cls("unix", target)
        if kind == "systemd" and target:
            return cls("systemd", target)
        if kind == "tcp" and target:
            host, colon, port = target.rpartition(":")
            if colon and host and port.isascii() and port.isdigit() and 1 <= int(port) <= 65535:
                return cls("tcp", _host(host), int(port))
            raise ValueError("expected tcp:HOST:PORT with a port from 1 to 65535")
        raise ValueError("expected unix:PATH, tcp:HOST:PORT or systemd:NAME")

    def __str__(self) -> str:
        if self.kind != "tcp":
            return f"{self.kind}:{self.target}"
        host = f"[{self.target}]" if ":" in self.target else self.target
        return f"tcp:{host}:{self.port}"


def _host(text: str) -> str:
    """Return the host as the socket wants it; a name is refused, looking it up may block."""
    host = text.removeprefix("[").removesuffix("]")
    if host != "localhost":
        try:
            ip_address(host.partition("%")[0])
        except ValueError:
            raise ValueError("HOST must be an IP address or localhost") from None
    return host


@dataclass(frozen=True, slots=True)
class DiskSpec:
    """A disk as it is asked for. Times in seconds, sizes in bytes."""

    name: str
    backend: str
    options: Mapping[str, Any] = field(default_factory=dict)  # the backend's own keys, converted
    device: str | None = None  # "/dev/nbdN", "auto" or none
    listen: tuple[Address, ...] = ()
    core: int | None = None
    readonly: bool = False
    block_size: int | None = None
    connections: int = 1
    timeout: int | None = None  # None: the attach way's default
    dead_timeout: int = 600
    attach: AttachWay = "auto"
    uuid: str | None = None  # given by JSON-RPC; not a key of disks.yaml

    def with_device(self, device: str | None) -> DiskSpec:
        """Return the same disk on another device."""
        return replace(self, device=device)

    def with_size(self, size: int) -> DiskSpec:
        """Return the same disk with another size, if it names one that is another."""
        if self.options.get("size", size) == size:
            return self
        return replace(self, options={**self.options, "size": size})

    def same_size(self, other: DiskSpec) -> bool:
        """Whether both name the same size, or none."""
        return self.options.get("size") == other.options.get("size")

    @property
    def storage(self) -> dict[str, Any]:
        """What says which data are meant, whatever size they should have."""
        return {**self.options, "backend": self.backend, "size": 0}

    def same_storage(self, other: DiskSpec) -> bool:
        """Whether both mean the same data, in whatever way it is reached."""
        return {**self.storage, "direct": None} == {**other.storage, "direct": None}

    def differences(self, other: DiskSpec) -> list[str]:
        """Return the keys, the backend's own too, that are not as in `other`."""
        mine, others = ({**asdict(spec), **spec.options} for spec in (self, other))
        keys = sorted({*mine, *others} - {"options"})
        return [key for key in keys if mine.get(key) != others.get(key)]

    def identity(self) -> str:
        """Return a digest of what must not change under a device while it is attached."""
        content = {**self.storage, "readonly": self.readonly, "block_size": self.block_size}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]

    def to_message(self) -> dict[str, Any]:
        """Return the plain map that crosses the bus."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["listen"] = [str(address) for address in self.listen]
        plain["options"] = dict(self.options)
        return plain

    @classmethod
    def from_message(cls, plain: Mapping[str, Any]) -> DiskSpec:
        """Rebuild from `to_message`; raises ValueError or TypeError when it is not one."""
        for key, kind in (("name", str), ("backend", str), ("options", dict)):
            if not isinstance(plain.get(key), kind):
                raise TypeError(f"{key} is missing or not {kind.__name__}")
        listen = tuple(Address.parse(str(text)) for text in plain.get("listen", ()))
        return cls(**{**plain, "listen": listen})

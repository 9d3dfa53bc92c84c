"""Backends as a config knows them, for its tests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from reactor.errors import ReactorError
from reactor.spec import BackendSchema, Key

CORES = (0, 1, 2)


def check_path(options: Mapping[str, object], block_size: int | None) -> list[tuple[str, str]]:
    """What a backend might refuse, with and without a key in the file."""
    found = []
    if str(options["path"]).endswith("/folder"):
        found.append(("path", "is a directory"))
    if options.get("direct") and block_size == 512:
        found.append(("block_size", "512 is too small for direct"))
    if str(options["path"]).endswith("/new") and "size" not in options:
        found.append(("size", "a new file needs a size"))
    return found


def nothing(options: Mapping[str, object], block_size: int | None) -> list[tuple[str, str]]:
    return []


class Schemas(Mapping[str, BackendSchema]):
    """Some backends; one of them is broken."""

    known = {  # noqa: RUF012
        "delay": BackendSchema((Key("base", "disk", True), Key("read", "seconds")), False, nothing),
        "file": BackendSchema(
            (Key("path", "path", True), Key("size", "size"), Key("direct", "boolean")),
            True,
            check_path,
        ),
        "malloc": BackendSchema((Key("size", "size", True),), True, nothing),
        "null": BackendSchema((Key("size", "size"), Key("label", "string")), False, nothing),
    }

    def __getitem__(self, name: str) -> BackendSchema:
        if name == "broken":
            raise ReactorError("backend broken cannot be loaded: no module named 'rados'")
        return self.known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(["broken", *self.known])

    def __len__(self) -> int:
        return 1 + len(self.known)


SCHEMAS = Schemas()

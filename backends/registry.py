"""Finds a backend by its name: a module here, or an entry point of another package."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points

import backends
from backends.api import Backend
from reactor.errors import ReactorError
from reactor.spec import BackendSchema

ENTRY_POINT_GROUP = "nbd_reactor.backends"
_NOT_BACKENDS = {
    "api",
    "buffers",
    "emulation",
    "engine",
    "filechannel",
    "filelock",
    "fileopen",
    "lanes",
    "linux",
    "registry",
    "sharedmemory",
    "slowness",
    "threads",
    "turns",
    "uring",
}


@cache
def names() -> tuple[str, ...]:
    """Return the names of all installed backends, sorted."""
    own = {module.name for module in pkgutil.iter_modules(backends.__path__)} - _NOT_BACKENDS
    others = {point.name for point in entry_points(group=ENTRY_POINT_GROUP)}
    return tuple(sorted(own | others))


@cache
def backend(name: str) -> type[Backend]:
    """Return the backend `name`; raises ReactorError when it is absent or cannot be loaded."""
    for point in entry_points(group=ENTRY_POINT_GROUP):
        if point.name == name:
            try:
                loaded = point.load()
            except Exception as error:
                message = f"backend {name}: {point.value} cannot be loaded: {error}"
                raise ReactorError(message) from error
            if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
                raise ReactorError(f"backend {name}: {point.value} is not a backends.api.Backend")
            return loaded
    if name not in names():
        raise ReactorError(f"no backend is called {name!r}; there are {', '.join(names())}")
    try:
        module = importlib.import_module(f"backends.{name}")
    except ImportError as error:  # a package that only this backend needs
        raise ReactorError(f"backend {name} cannot be loaded: {error}") from error
    found: type[Backend] = module.BACKEND
    return found


def can_share(name: str) -> bool:
    """Return whether several workers may serve a disk of this backend at once."""
    try:
        return backend(name).disk.can_share
    except ReactorError:  # the disk will say so when it is opened
        return False


def paths(name: str, options: Mapping[str, object]) -> set[str]:
    """Return the files and devices on which a disk of this backend keeps its data."""
    try:
        keys = backend(name).keys
    except ReactorError:
        return set()
    found = (options.get(key.name) for key in keys if key.kind == "path")
    return {os.path.normpath(str(path)) for path in found if path is not None}


class _Schemas(Mapping[str, BackendSchema]):
    """The backends as a config sees them; each is loaded when it is first asked for."""

    def __getitem__(self, name: str) -> BackendSchema:
        if name not in names():
            raise KeyError(name)
        found = backend(name)
        return BackendSchema(found.keys, found.disk.can_multi_conn, found.check)

    def __iter__(self) -> Iterator[str]:
        return iter(names())

    def __len__(self) -> int:
        return len(names())


def schemas() -> Mapping[str, BackendSchema]:
    """Return what configs must know of every backend; a look-up may raise ReactorError."""
    return _Schemas()

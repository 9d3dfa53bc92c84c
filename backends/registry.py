"""Finds a backend by its name: a module here, or an entry point of another package."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from backends.api import Backend
from reactor.errors import ReactorError, is_shortage
from reactor.spec import BackendSchema

ENTRY_POINT_GROUP = "nbd_reactor.backends"
_NOT_BACKENDS = {
    "__init__",
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
def own_names() -> tuple[str, ...]:
    """Return the names of the backends that are modules here, sorted; raises OSError."""
    # Not by pkgutil, which takes a folder that it cannot list for an empty one.
    files = Path(__file__).parent.iterdir()
    return tuple(sorted({file.stem for file in files if file.suffix == ".py"} - _NOT_BACKENDS))


@cache
def _others() -> Mapping[str, EntryPoint]:
    for folder in filter(os.path.isdir, sys.path):
        try:
            os.close(os.open(folder, os.O_RDONLY))  # else entry_points() takes it for empty, too
        except OSError as error:
            if is_shortage(error):
                raise
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


@cache
def names() -> tuple[str, ...]:
    """Return the names of all installed backends, sorted; raises OSError."""
    return tuple(sorted({*own_names(), *_others()}))


@cache
def backend(name: str) -> type[Backend]:
    """Return the backend `name`; raises ReactorError when it is absent or cannot be loaded.

    That there is no memory, or no descriptor, for it now is an OSError or a MemoryError.
    """
    if name in own_names():
        try:
            module = importlib.import_module(f"backends.{name}")
        except ImportError as error:  # a package that only this backend needs
            raise ReactorError(f"backend {name} cannot be loaded: {error}") from error
        found: type[Backend] = module.BACKEND
        return found
    point = _others().get(name)
    if point is None:
        raise ReactorError(f"no backend is called {name!r}; there are {', '.join(names())}")
    try:
        loaded = point.load()
    except Exception as error:
        if is_shortage(error):
            raise
        raise ReactorError(f"backend {name}: {point.value} cannot be loaded: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Backend)):
        raise ReactorError(f"backend {name}: {point.value} is not a backends.api.Backend")
    return loaded


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

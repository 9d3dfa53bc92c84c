"""Finds a backend by its name: a module here, or an entry point of another package."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

import backends
from backends.api import Backend
from reactor.errors import ReactorError

ENTRY_POINT_GROUP = "nbd_reactor.backends"
_NOT_BACKENDS = {"api", "registry", "emulation", "uring"}


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
    module = importlib.import_module(f"backends.{name}")
    found: type[Backend] = module.BACKEND
    return found

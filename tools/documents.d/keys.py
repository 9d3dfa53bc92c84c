"""The keys of disks.yaml as its reader knows them."""

from __future__ import annotations

from typing import Final

from backends import registry
from reactor.config.keys import COMMON
from reactor.spec import Key

NAMES: Final = tuple(
    name for name in registry.names() if registry.backend(name).__module__ == f"backends.{name}"
)


def backend_keys(name: str) -> tuple[Key, ...]:
    """Return the keys that a backend adds."""
    return registry.backend(name).keys


def backend_about(name: str) -> str:
    """Return what the disks of a backend are."""
    return registry.backend(name).about


def all_names() -> list[str]:
    """Return every key that a disk can have."""
    own = {key.name for name in NAMES for key in backend_keys(name)}
    return [*COMMON, *sorted(own)]

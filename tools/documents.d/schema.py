"""A JSON schema of disks.yaml, for editors.

Keys of `defaults` count for the disks that lack them, so what a disk must have depends on both.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from keys import NAMES, all_names, backend_about, backend_keys

from reactor.config.keys import COMMON, KINDS, NAME
from reactor.spec import NAME_MAX, Key

Schema: TypeAlias = dict[str, Any]
#: A word that YAML takes for nothing where editors look, and the reader for a name.
NULL: Final = "null"
HAS_BACKEND: Final = {"type": "object", "required": ["backend"]}


def schema() -> Schema:
    """Return the schema of a whole file."""
    disks = {
        "type": ["object", "null"],
        "propertyNames": {"pattern": f"^{NAME.pattern}$", "maxLength": NAME_MAX},
        "additionalProperties": {"$ref": "#/definitions/disk"},
        "description": "disks by their names, which are also the names of their exports",
    }
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "disks.yaml of nbd-reactor",
        "type": ["object", "null"],
        "properties": {"disks": disks, "defaults": _defaults()},
        "additionalProperties": False,
        "allOf": [*_needed()],
        "definitions": {"disk": _disk()},
    }


def _disk() -> Schema:
    return {
        "type": ["object", "null"],
        "properties": {name: _common(name) if name in COMMON else True for name in all_names()},
        "additionalProperties": False,
        "allOf": [{"if": _is(name), "then": {"properties": _own(name)}} for name in NAMES],
    }


def _defaults() -> Schema:
    own = {key.name: _key(key) for name in NAMES for key in backend_keys(name)}
    return {
        "type": ["object", "null"],
        "properties": own | {name: _common(name) for name in COMMON},
        "additionalProperties": False,
        "description": "keys for every disk that does not have them itself",
    }


def _needed() -> Iterator[Schema]:
    """Yield what disks need that `defaults` do not give, and must be if those choose for them."""
    yield _unless_default("backend", HAS_BACKEND)
    for name in NAMES:
        chosen = {"required": ["defaults"], "properties": {"defaults": _is(name)}}
        own = {"if": HAS_BACKEND, "else": {"properties": _own(name)}}
        yield {"if": chosen, "then": _each_disk(own)}
        for key in (key.name for key in backend_keys(name) if key.required):
            has = {"type": "object", "required": [key]}
            yield _unless_default(key, {"if": _is(name), "then": has})
            lacking = _unless_default(key, {"if": HAS_BACKEND, "else": has})
            yield {"if": chosen, "then": lacking}


def _unless_default(key: str, disk: Schema) -> Schema:
    given = {
        "required": ["defaults"],
        "properties": {"defaults": {"type": "object", "required": [key]}},
    }
    return {"if": {"not": given}, "then": _each_disk(disk)}


def _each_disk(disk: Schema) -> Schema:
    return {"properties": {"disks": {"additionalProperties": disk}}}


def _is(backend: str) -> Schema:
    return {"type": "object", "required": ["backend"], "properties": {"backend": _named(backend)}}


def _named(*backends: str) -> Schema:
    return {"enum": [*backends, *([None] if NULL in backends else [])]}


def _own(backend: str) -> Schema:
    """Return the backend's keys; those of others are wrong."""
    own = {key.name: _key(key) for key in backend_keys(backend)}
    others = {name: False for name in all_names() if name not in COMMON and name not in own}
    return own | others


def _common(name: str) -> Schema:
    key = COMMON[name]
    if name == "backend":
        kinds = "; ".join(f"{each}: {backend_about(each)}" for each in NAMES)
        return {**_named(*NAMES), "description": f"{key.meaning}; {kinds}"}
    return {**key.kind.schema, "description": _plain(f"{key.meaning}; default: {key.default}")}


def _key(key: Key) -> Schema:
    return {**KINDS[key.kind].schema, "description": _plain(key.meaning)}


def _plain(text: str) -> str:
    return text.replace("`", "")

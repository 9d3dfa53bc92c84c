"""One disk: from keys and values to a DiskSpec."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from os.path import normpath
from pathlib import Path
from typing import Any, TypeAlias

from reactor.config.document import Entry, Value, place_of
from reactor.config.keys import (
    BLOCK_SIZE_MIN,
    COMMON,
    DEVICE_BLOCK_SIZE_MAX,
    KINDS,
    disk_name,
    text,
)
from reactor.config.problems import Problems, listed, unknown
from reactor.cores import format_cores
from reactor.errors import ReactorError
from reactor.spec import BackendSchema, DiskSpec, Key

Schemas: TypeAlias = Mapping[str, BackendSchema]


@dataclass(frozen=True, slots=True)
class Rules:
    """What disks are read by. Relative paths start at `directory`."""

    schemas: Schemas
    cores: Collection[int]
    directory: Path


@dataclass(slots=True)
class Draft:
    """A disk being read: what is given, and as much of it as is right."""

    name: str
    here: Entry
    given: Mapping[str, Entry]
    problems: Problems
    values: dict[str, Any] = field(default_factory=dict)
    bases: list[tuple[str, str]] = field(default_factory=list)  # key, name of the base
    paths: list[tuple[str, str]] = field(default_factory=list)  # key, what it keeps its data on
    spec: DiskSpec | None = None

    def note(self, key: str, problem: str) -> None:
        """Note a problem of `key`, which may be absent."""
        entry = self.given.get(key)
        if entry is None:
            self.problems.add(self.here.line, place_of(self.here, key), problem)
        else:
            self.problems.add(entry.line, entry.place, problem)


def parse_disk(
    name: str, keys: Mapping[str, Any], schemas: Schemas, cores: Collection[int]
) -> DiskSpec:
    """Return the disk that `keys` describe; values are text, or what JSON gives.

    For disks made at run time: relative paths start at the working directory, and whether a base
    exists is the service's to know. Raises ConfigError.
    """
    problems = Problems()
    here = Entry(place_of(Entry("disks", 0), name), 0)
    given = {key: Entry(place_of(here, key), 0, _value(value)) for key, value in keys.items()}
    rules = Rules(schemas, cores, Path.cwd())
    draft = read_disk(name, here, given, {}, rules, problems)
    if draft.spec is None:
        raise problems.error()
    return draft.spec


def read_disk(
    name: str,
    here: Entry,
    own: Mapping[str, Entry],
    defaults: Mapping[str, Entry],
    rules: Rules,
    problems: Problems,
) -> Draft:
    """Return the disk `name`, with a spec when it has no problems; those are noted."""
    backend = own.get("backend", defaults.get("backend"))
    schema, about_backend = _schema(backend, rules.schemas)
    keys = all_keys(rules.schemas) if schema is None else keys_of(schema)
    if schema is None and backend is not None:
        # Other keys may be right with the backend that is meant.
        own = {key: entry for key, entry in own.items() if key in keys}
    given = {**{key: entry for key, entry in defaults.items() if key in keys}, **own}
    draft = Draft(name, here, given, problems)
    wrong = [*_convert(draft, keys, rules.directory)]
    if about_backend:
        wrong.append(("backend", about_backend))
    if schema is not None:
        wrong += _missing(draft, schema)
        wrong += _clashes(draft.values, schema, rules.cores)
        if not wrong:
            wrong += schema.check(_options(draft.values), draft.values.get("block_size"))
    for key, problem in wrong:
        draft.note(key, problem)
    try:
        disk_name(name)
    except ValueError as error:
        problems.add(here.line, here.place, str(error))
    else:
        if not wrong:
            draft.spec = _spec(name, draft.values)
    return draft


def keys_of(schema: BackendSchema) -> dict[str, Key | None]:
    """Return the keys of a backend's disks; None stands for those of every disk."""
    return {key.name: key for key in schema.keys} | dict.fromkeys(COMMON)


def all_keys(schemas: Schemas) -> dict[str, Key | None]:
    """Return the keys of all backends that can be loaded."""
    keys: dict[str, Key | None] = {}
    for name in schemas:
        schema, problem = _load(name, schemas)
        if schema is not None and not problem:
            keys |= keys_of(schema)
    return keys | dict.fromkeys(COMMON)


def _schema(entry: Entry | None, schemas: Schemas) -> tuple[BackendSchema | None, str]:
    """Return the schema, or what is wrong with the backend's name (unless its type is)."""
    if entry is None:
        return None, f"missing; there are {listed(schemas)}"
    try:
        return _load(text(entry.value, kind="a backend"), schemas)
    except ValueError:  # told where the value is converted
        return None, ""


def _load(name: str, schemas: Schemas) -> tuple[BackendSchema | None, str]:
    try:
        return schemas[name], ""
    except KeyError:
        return None, unknown("backend", name, schemas, list_all=True)
    except ReactorError as error:  # another package's backend may be broken
        return None, str(error)


def _convert(
    draft: Draft, keys: Mapping[str, Key | None], directory: Path
) -> Iterator[tuple[str, str]]:
    """Fill in the values that are right, and yield what is wrong with the others."""
    for name, entry in draft.given.items():
        if name not in keys:
            yield name, unknown("key", name, keys)
            continue
        key = keys[name]
        try:
            value = (COMMON[name].kind if key is None else KINDS[key.kind]).read(entry.value)
        except ValueError as error:
            yield name, str(error)
            continue
        if key is not None and key.kind == "path":
            value = str(directory / str(value))
            draft.paths.append((name, normpath(value)))
        elif key is not None and key.kind == "disk":
            draft.bases.append((name, str(value)))
        draft.values[name] = value


def _missing(draft: Draft, schema: BackendSchema) -> Iterator[tuple[str, str]]:
    for key in schema.keys:
        if key.required and key.name not in draft.given:
            yield key.name, f"missing; the backend {draft.values['backend']} needs it"


def _clashes(
    values: Mapping[str, Any], schema: BackendSchema, cores: Collection[int]
) -> Iterator[tuple[str, str]]:
    """Yield the values that are right by themselves, but not with the others."""
    size, block_size = values.get("size"), values.get("block_size", BLOCK_SIZE_MIN)
    if size == 0:
        yield "size", "must be more than 0"
    elif isinstance(size, int) and size % block_size:
        yield "size", f"{size} is not a multiple of the block size, {block_size}"
    if "device" in values and block_size > DEVICE_BLOCK_SIZE_MAX:
        yield (
            "block_size",
            f"{block_size} is too large for a device, at most it takes "
            + str(DEVICE_BLOCK_SIZE_MAX),
        )
    if values.get("connections", 1) > 1 and not schema.can_multi_conn:
        yield "connections", f"the backend {values['backend']} serves only one"
    core = values.get("core")
    if core is not None and core not in cores:
        yield "core", f"core {core} is not one of the service's, {format_cores(cores)}"


def _options(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in COMMON}


def _spec(name: str, values: Mapping[str, Any]) -> DiskSpec:
    common = {key: value for key, value in values.items() if key in COMMON}
    return DiskSpec(name=name, options=_options(values), **common)


def _value(value: object, *, nested: bool = False) -> Value:
    if isinstance(value, (list, tuple)):
        return [] if nested else [_value(item, nested=True) for item in value]
    if isinstance(value, dict):
        return {}
    if value is None or isinstance(value, bool):
        return value
    return str(value)

"""disks.yaml as a whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from reactor.config.conflicts import note_conflicts
from reactor.config.disk import Rules, Schemas, all_keys, read_disk
from reactor.config.document import Entry, entries, read
from reactor.config.keys import COMMON
from reactor.config.problems import Problems, unknown
from reactor.spec import DiskSpec

SECTIONS = ("disks", "defaults")


def load(path: Path, schemas: Schemas, cores: Collection[int]) -> tuple[DiskSpec, ...]:
    """Return the disks of the config at `path`, in its order; a file without any is fine.

    Relative paths start at the file's directory. `cores` are those that have a worker. Raises
    ConfigError with every problem of the file, or UsageError when it cannot be read.
    """
    problems = Problems(str(path))
    root = entries(read(path, problems), problems, kind="the keys disks and defaults")
    for key, entry in root.items():
        if key not in SECTIONS:
            problems.add(entry.line, entry.place, unknown("key", key, SECTIONS))
    nothing = Entry("", 1)
    disks = entries(root.get("disks", nothing), problems, kind="disks by their names")
    defaults = entries(root.get("defaults", nothing), problems, kind="keys of disks")
    _check_defaults(defaults, schemas, problems)
    rules = Rules(schemas, cores, path.absolute().parent)
    drafts = {}
    for name, here in disks.items():
        own = entries(here, problems, kind="the keys of a disk")
        drafts[name] = read_disk(name, here, own, defaults, rules, problems)
    note_conflicts(drafts)
    if problems:
        raise problems.error()
    return tuple(draft.spec for draft in drafts.values() if draft.spec is not None)


def _check_defaults(defaults: Mapping[str, Entry], schemas: Schemas, problems: Problems) -> None:
    """Note what is wrong whatever the disks; a backend's key is converted for its disks only."""
    for name, entry in defaults.items():
        if name in COMMON:
            try:
                COMMON[name].kind.read(entry.value)
            except ValueError as error:
                problems.add(entry.line, entry.place, str(error))
        elif name not in (keys := all_keys(schemas)):
            problems.add(entry.line, entry.place, unknown("key", name, keys))

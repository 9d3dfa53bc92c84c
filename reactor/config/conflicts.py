"""What disks that are right by themselves may not do together."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping

from reactor.config.disk import Draft
from reactor.config.problems import unknown
from reactor.spec import Address


def note_conflicts(drafts: Mapping[str, Draft]) -> None:
    """Note every conflict between the disks."""
    _shared_devices(drafts)
    _shared_paths(drafts)
    _missing_bases(drafts)
    _cycles_of_bases(drafts)
    _torn_apart(drafts)


def _shared_devices(drafts: Mapping[str, Draft]) -> None:
    owners: dict[str, Draft] = {}
    for draft in drafts.values():
        device = draft.values.get("device", "auto")
        if device == "auto":
            continue
        owner = owners.setdefault(device, draft)
        if owner is not draft:
            draft.note("device", f"{device} is also the device of {_called(owner, 'device')}")


def _shared_paths(drafts: Mapping[str, Draft]) -> None:
    owners: dict[str, tuple[Draft, str]] = {}
    for draft in drafts.values():
        for key, path in draft.paths:
            owner, its_key = owners.setdefault(path, (draft, key))
            only_read = all(each.values.get("readonly", False) for each in (owner, draft))
            if owner is not draft and not only_read:
                called = _called(owner, its_key)
                draft.note(
                    key, f"{path} is also the {its_key} of {called}, and not readonly in both"
                )


def _missing_bases(drafts: Mapping[str, Draft]) -> None:
    for draft in drafts.values():
        for key, base in draft.bases:
            if base not in drafts:
                draft.note(key, unknown("disk", base, drafts))


def _cycles_of_bases(drafts: Mapping[str, Draft]) -> None:
    bases = {name: {base for _, base in draft.bases} for name, draft in drafts.items()}
    while True:
        try:
            graphlib.TopologicalSorter(bases).prepare()
        except graphlib.CycleError as error:
            cycle: list[str] = error.args[1][::-1]  # it comes from base to user
            # It begins anywhere; tell it from the disk that stands first in the file.
            first = min(cycle, key=list(drafts).index)
            at = cycle.index(first)
            cycle = [*cycle[at:-1], *cycle[:at], first]
            key = next(key for key, base in drafts[first].bases if base == cycle[1])
            drafts[first].note(key, f"a cycle of bases: {' -> '.join(cycle)}")
            bases[first].discard(cycle[1])
        else:
            return


def _torn_apart(drafts: Mapping[str, Draft]) -> None:
    """One worker serves an address, and owns a disk with its base: all these have one core."""
    parents: dict[str | Address, str | Address] = {}

    def root(node: str | Address) -> str | Address:
        while (parent := parents.setdefault(node, node)) != node:
            parents[node] = node = parents[parent]
        return node

    for draft in drafts.values():
        for tied in (*(base for _, base in draft.bases), *draft.values.get("listen", ())):
            parents[root(tied)] = root(draft.name)
    pinned: dict[str | Address, Draft] = {}
    for draft in drafts.values():
        if "core" not in draft.values:
            continue
        other = pinned.setdefault(root(draft.name), draft)
        if draft.values["core"] != other.values["core"]:
            draft.note(
                "core",
                f"one worker must own this disk and {_called(other, 'core')} with core"
                f" {other.values['core']}: they share an address or a base",
            )


def _called(draft: Draft, key: str) -> str:
    return f"disk {draft.name} (line {draft.given[key].line})"

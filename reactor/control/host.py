"""What all disks of a service share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reactor.control.platform import Platform
from reactor.spec import Address

if TYPE_CHECKING:
    from reactor.control.disk import DiskControl


@dataclass(frozen=True, slots=True)
class Host:
    """The world, and what only who knows all disks can say or do."""

    platform: Platform
    save: Callable[[], None]  # keep what the disks should be, before anything is done for it
    save_soon: Callable[[Callable[[], None]], None]  # ... with others; and what goes on then
    on_settled: Callable[[DiskControl], None]  # a disk is what it should be, or failed
    holding: Callable[[], bool]  # no disk goes on before all know what they will be
    listens: Callable[[DiskControl, Iterable[Address]], None]  # a disk does, or will, there
    hindrance: Callable[[DiskControl], str]  # what it must wait for before it is opened
    attach_hindrance: Callable[[DiskControl], str]  # ... before it is attached; empty: nothing
    keeps: Callable[[], bool]  # devices and memory stay when the disks go
    let_go_seconds: Callable[[], float]  # for which workers may take to let go of a disk
    may_fail: Callable[[], bool]  # the start may, and then devices are left as they were found
    is_succeeded: Callable[[DiskControl], bool]  # another disk takes over its storage

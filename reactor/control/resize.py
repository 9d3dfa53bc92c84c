"""A disk's change of size: its storage and its device, in the order that is safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from reactor.control.link import DeviceLink
from reactor.control.service import Done
from reactor.control.shares import Geometry, Shares
from reactor.errors import error_number, reason


@dataclass(frozen=True, slots=True)
class Resize:
    """Another size that was asked for. Sizes in bytes."""

    size: int
    done: Done
    before: int  # the size that the spec named
    refusal: Exception | None = None  # why the storage kept its size; all must show it again

    def geometry(self, shares: Shares) -> Geometry:
        """Return what the kernel may believe in meanwhile: blocks that all have, and will have."""
        if self.refusal is not None:
            return shares.geometry
        sizes = (share.size for share in shares.opened)
        return replace(shares.geometry, size=min([self.size, *sizes]))

    def begin(
        self,
        link: DeviceLink,
        shares: Shares,
        *,
        keep: Callable[[], None],
        refused: Callable[[Exception], None],
        finish: Callable[[Exception | None], None],
    ) -> None:
        """Change all; `finish(error)` comes then, or `refused` when the storage keeps its size.

        `keep` is called before the storage changes: should a worker die in the middle, the next
        one opens what is wanted.
        """
        device, size = link.device, self.size

        def resize_device(then: Callable[[], None], failed: Callable[[Exception], None]) -> None:
            if device is None:
                then()
                return
            geometry = replace(shares.geometry, size=size)
            link.resize(
                device, geometry, lambda error: failed(error) if error is not None else then()
            )

        def resize_disk(then: Callable[[], None]) -> None:
            keep()
            shares.resize(size, then, refused)

        def told_later(error: Exception) -> None:
            why = f"the disk has its new size, but its device not yet: {reason(error)}"
            finish(OSError(error_number(error), why))

        # The kernel must never believe in blocks that the disk does not have.
        if size >= shares.geometry.size:
            resize_disk(lambda: resize_device(lambda: finish(None), told_later))
        else:
            resize_device(lambda: resize_disk(lambda: finish(None)), finish)

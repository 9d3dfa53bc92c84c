"""A disk's change of size: its storage and its device, in the order that is safe."""

from __future__ import annotations

import errno
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
    shown: int  # ... and that the disk had
    overrules: int  # what the config had asked for by then; 0: no more than it had
    refusal: Exception | None = None  # why nothing changes; all must show their size again

    def geometry(self, shares: Shares) -> Geometry:
        """Return what the kernel may believe in meanwhile: blocks that all have, and will have."""
        common = shares.common_geometry
        size = min(self.size, common.size)
        if shares.closed:  # who opens it anew is asked for no more than there was
            size = min(size, self.shown)
        return replace(common, size=size)

    def begin(
        self,
        link: DeviceLink,
        shares: Shares,
        *,
        keep: Callable[[Callable[[], None]], None],
        refused: Callable[[Exception], None],
        finish: Callable[[Exception | None], None],
    ) -> None:
        """Change all; `finish(error)` comes then, or `refused` when storage or device does not.

        `keep(then)` is called before the storage is cut and after it has grown: should a worker
        die in the middle, the next one opens what is there, or asks for no more than there was.
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

        def grown() -> None:
            keep(lambda: resize_device(lambda: finish(None), told_later))

        def cut() -> None:
            keep(lambda: shares.resize(size, lambda: finish(None), refused))

        def told_later(error: Exception) -> None:
            why = f"the disk has its new size, but its device not yet: {reason(error)}"
            finish(OSError(error_number(error), why))

        # The kernel must never believe in blocks that the disk does not have.
        now = shares.geometry.size
        if size >= now:
            shares.resize(size, grown, refused)
        elif size >= self.shown:  # it was to grow, and somebody has made it larger than that
            refused(OSError(errno.EINVAL, f"the disk has {now} bytes by now, and is not cut"))
        else:
            resize_device(cut, refused)

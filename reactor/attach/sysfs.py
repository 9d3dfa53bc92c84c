"""What /sys says about nbd devices. Files may vanish at any moment: that reads as "not there".

Everything raises OSError when it cannot be known, for want of descriptors above all.
"""

from __future__ import annotations

import contextlib
import errno
import re
from pathlib import Path
from typing import Final

BLOCK: Final = Path("/sys/block")
MODULE: Final = Path("/sys/module/nbd")  # also there when the driver is built in
SECTOR: Final = 512  # bytes; the unit of `size` whatever the block size

#: What a file answers that is not there, or not any more. Else nothing is known of it.
ABSENT: Final = (errno.ENOENT, errno.ENOTDIR, errno.ENODEV, errno.ENXIO)

_NAME: Final = re.compile(r"nbd(0|[1-9][0-9]{0,5})")


def driver_present() -> bool:
    """Whether the kernel has the nbd driver."""
    return MODULE.exists() or bool(indexes())


def indexes() -> list[int]:
    """Return the indexes of all nbd devices, configured or not."""
    return sorted(int(match[1]) for name in names(BLOCK) if (match := _NAME.fullmatch(name)))


def pid(index: int) -> int | None:
    """Return the id of the thread that configured the device; None: it is not configured.

    The thread may have ended long ago.
    """
    text = _read(index, "pid")
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def backend(index: int) -> str | None:
    """Return the tag that the device was connected with; only netlink devices have one."""
    return _read(index, "backend")


def size(index: int) -> int:
    """Return the device's size in bytes; 0 when it has none."""
    text = _read(index, "size")
    return int(text) * SECTOR if text else 0


def block_size(index: int) -> int:
    """Return the logical block size in bytes."""
    return int(_read(index, "queue/logical_block_size") or SECTOR)


def in_flight(index: int) -> int:
    """Return how many reads and writes the device has not finished."""
    return sum(int(number) for number in (_read(index, "inflight") or "").split())


def holders(index: int) -> list[str]:
    """Return the block devices that are built on this one or on a partition of it."""
    disk = BLOCK / f"nbd{index}"
    parts = [disk / name for name in names(disk) if name.startswith(f"nbd{index}p")]
    return sorted(name for part in (disk, *parts) for name in names(part / "holders"))


def loop_files() -> list[tuple[str, str]]:
    """Return the loop devices that have a file, each with its path."""
    found = sorted(name for name in names(BLOCK) if name.startswith("loop"))
    files = ((name, text(BLOCK / name / "loop/backing_file")) for name in found)
    return [(name, file) for name, file in files if file is not None]


def is_free(index: int) -> bool:
    """Whether nothing is configured, in flight or built on the device."""
    return pid(index) is None and not (size(index) or in_flight(index) or holders(index))


def io_timeout(index: int) -> int:
    """Return after how many milliseconds the block layer asks the driver about a request."""
    return int(_read(index, "queue/io_timeout") or 0)


def announce(index: int) -> None:
    """Have udev look at the device again.

    The kernel's own event comes before the tag is there, and none comes at the release.
    """
    with contextlib.suppress(OSError):  # without /sys to write to, only names are missing
        (BLOCK / f"nbd{index}/uevent").write_text("change")


def names(folder: Path) -> list[str]:
    """Return the names in a folder; none when it is not there."""
    try:
        return [path.name for path in folder.iterdir()]
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise


def text(path: Path) -> str | None:
    """Return what is in a file; None when it is not there."""
    try:
        # Binary: a backend tag is whatever its owner wrote.
        return path.read_bytes().decode(errors="replace").strip()
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise


def _read(index: int, name: str) -> str | None:
    return text(BLOCK / f"nbd{index}" / name)

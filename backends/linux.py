"""The system calls on files and block devices that Python's `os` lacks."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
from pathlib import Path
from struct import Struct
from typing import Final

# include/uapi/linux/falloc.h
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

NBD_MAJOR: Final = 43  # include/uapi/linux/major.h
_BLKSSZGET: Final = 0x1268  # include/uapi/linux/fs.h
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272
_RANGE: Final = Struct("=QQ")
_LOCK: Final = Struct("@hhqqi4x")  # struct flock: type, whence, start, length, pid
_AT_EMPTY_PATH: Final = 0x1000
_STATX_DIOALIGN: Final = 0x2000  # Linux 6.1
_STATX_SIZE: Final = 256
_STX_DIO_OFFSET_ALIGN: Final = 156  # in struct statx; stx_mask is at 0

_libc = ctypes.CDLL(None, use_errno=True)
_fallocate = _libc.fallocate64
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_statx = _libc.statx
_statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_char_p,
)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Punch, zero or allocate a range; `mode` is FALLOC_FL_*. Raises OSError."""
    if _fallocate(fd, mode, offset, length) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def direct_alignment(fd: int) -> int | None:
    """Return to what O_DIRECT offsets must be aligned: 0 never works, None when not known."""
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if _statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) < 0:
        return None
    mask = int.from_bytes(answer.raw[:4], sys.byteorder)
    field = answer.raw[_STX_DIO_OFFSET_ALIGN : _STX_DIO_OFFSET_ALIGN + 4]
    return int.from_bytes(field, sys.byteorder) if mask & _STATX_DIOALIGN else None


def lock_range(fd: int, kind: int, start: int, length: int) -> bool:
    """Lock a range of a file, F_RDLCK or F_WRLCK; False when another open of it forbids that.

    The lock belongs to this open of the file (F_OFD_SETLK) and ends with it. Raises OSError.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, start, length, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def unlock_range(fd: int, start: int, length: int) -> None:
    """Give up a lock of `lock_range`."""
    lock_range(fd, fcntl.F_UNLCK, start, length)


def is_range_locked(fd: int, start: int, length: int) -> bool:
    """Return whether another open of the file has a lock in a range. Raises OSError."""
    probe = _LOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, probe)
    kind: int = _LOCK.unpack(found)[0]
    return kind != fcntl.F_UNLCK


def logical_block_size(fd: int) -> int:
    """Return a block device's smallest unit of I/O in bytes."""
    return int.from_bytes(fcntl.ioctl(fd, _BLKSSZGET, bytes(4)), sys.byteorder)


def device_size(fd: int) -> int:
    """Return a block device's size in bytes; 0 for one that is gone. Raises OSError.

    A seek to the end would wait for what others do to the device: it takes the inode's lock.
    """
    return int.from_bytes(fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8)), sys.byteorder)


def discard(fd: int, offset: int, length: int) -> None:
    """Tell a block device that a range is no longer needed; may block. Raises OSError."""
    fcntl.ioctl(fd, _BLKDISCARD, _RANGE.pack(offset, length))


def can_discard(device: int) -> bool:
    """Return whether the block device with this number (st_rdev) takes discards."""
    folder = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (folder / "queue", folder / ".." / "queue"):  # a partition has its disk's
        try:
            return int((queue / "discard_max_bytes").read_text()) > 0
        except (OSError, ValueError):
            continue
    return False

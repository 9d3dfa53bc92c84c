"""Opening what a file disk stands on: every check that can be made before it is served."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from backends.filelock import READERS, DeviceClaim, lock_file
from backends.linux import NBD_MAJOR, direct_alignment, logical_block_size
from reactor import background
from reactor.log import logger

# A new image is its owner's: what a disk holds is rarely everybody's business.
IMAGE_MODE: Final = 0o600
SMALLEST_BLOCK: Final = 512
CLOSE_SECONDS: Final = 0.5
TRY_SECONDS: Final = 0.5
PAGE: Final = mmap.PAGESIZE

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class OpenFile:
    """An open regular file or block device. Sizes in bytes."""

    path: str
    fd: int
    size: int
    block_size: int
    is_device: bool
    direct: bool
    claim: DeviceClaim | None  # of a device that several workers write to

    def close(self) -> None:
        """Close it. A device that is slow to write what it still has to does so beside us."""
        if self.claim is not None:
            self.claim.close()
        if not self.is_device:
            os.close(self.fd)
            return
        if not _finishes(partial(os.close, self.fd), CLOSE_SECONDS):
            log.warning("%s is closed, but still being written to", self.path)


def open_file(
    options: Mapping[str, object],
    *,
    block_size: int | None,
    readonly: bool,
    sharers: int | None = None,
    least: int = 0,
) -> OpenFile:
    """Open, create or grow the file of a disk; raises OSError that names it and says why.

    `sharers` is the mark (see `filelock`) of the workers that share the disk, if several do.
    `least`: bytes that it must have; only with 0 it is created.
    """
    path = str(options["path"])
    wanted = options.get("size")
    assert wanted is None or isinstance(wanted, int)
    direct = bool(options.get("direct", False))
    try:
        status = Path(path).stat()
    except FileNotFoundError:
        if problem := _why_not_created(path, wanted, readonly=readonly, least=least):
            raise _error(errno.ENOENT, path, problem) from None
        assert wanted is not None
        _create(path, wanted)
        status = Path(path).stat()
    is_device = _require_storage(path, status)
    alone = is_device and not readonly and sharers is None
    fd = _open(path, is_device=is_device, readonly=readonly, direct=direct, alone=alone)
    try:
        if not is_device:
            lock_file(fd, path, READERS if readonly else sharers)
        alignment = _direct_alignment(fd, path) if direct else SMALLEST_BLOCK
        smallest = max(logical_block_size(fd) if is_device else SMALLEST_BLOCK, alignment or 0)
        block_size = block_size or smallest
        if block_size < smallest:
            problem = f"the block size {block_size} is below the {smallest} that I/O here needs"
            raise _error(errno.EINVAL, path, problem)
        _require_bytes(fd, path, least)
        size = _size(fd, path, wanted, block_size, is_device=is_device, readonly=readonly)
        if alignment is None and not is_device:
            _try_direct(fd, path, block_size)
        claim = None
        if is_device and not readonly and sharers is not None:
            claim = DeviceClaim(fd, path, sharers)
    except BaseException:
        os.close(fd)
        raise
    return OpenFile(path, fd, size, block_size, is_device, direct, claim)


def try_to_read(path: str) -> None:
    """Read the beginning from the medium, not the page cache if that can be; may hang.

    Raises OSError.
    """
    status = Path(path).stat()
    regular, device = stat.S_ISREG(status.st_mode), stat.S_ISBLK(status.st_mode)
    if not (regular or device) or (device and os.major(status.st_rdev) == NBD_MAJOR):
        return
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.open(path, os.O_RDONLY)  # its file system has no O_DIRECT
    try:
        with mmap.mmap(-1, PAGE) as page:
            os.preadv(fd, [page], 0)
    finally:
        os.close(fd)


def _error(number: int, path: str, problem: str) -> OSError:
    return OSError(number, problem, path)


def _require_bytes(fd: int, path: str, least: int) -> None:
    available = os.lseek(fd, 0, os.SEEK_END)
    if available < least:
        raise _error(errno.EINVAL, path, _lost(f"has only {available} bytes", least))


def _lost(problem: str, least: int) -> str:
    return (
        f"{problem}, and had at least {least} when the disk was last open: mount or restore it,"
        " then start the disk; one that is stopped, then started, takes what is there or a new one"
    )


def _why_not_created(path: str, wanted: int | None, *, readonly: bool, least: int) -> str:
    if least:
        return _lost("is gone", least)
    real = os.path.realpath(path)
    if real.startswith("/dev/") and not real.startswith("/dev/shm/"):
        return "no such device"  # a file in its place would be lost with the next boot
    if wanted is None:
        return "no such file, and no size to create it"
    return "no such file, and the disk is read-only" if readonly else ""


def _create(path: str, size: int) -> None:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, IMAGE_MODE)
    except FileExistsError:  # someone was faster: it is opened like any other
        return
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        Path(path).unlink()
        raise _error(error.errno or errno.EIO, path, f"cannot be {size} bytes large") from error
    finally:
        os.close(fd)


def _require_storage(path: str, status: os.stat_result) -> bool:
    """Return whether it is a block device; raises OSError unless that or a regular file."""
    mode = status.st_mode
    if stat.S_ISDIR(mode):
        raise _error(errno.EISDIR, path, "is a directory, not a regular file or block device")
    if stat.S_ISBLK(mode):
        if os.major(status.st_rdev) == NBD_MAJOR:
            # A worker that opens a device of its own service waits for itself, for ever.
            raise _error(errno.EINVAL, path, "is an nbd device, which could be served by us")
        return True
    if not stat.S_ISREG(mode):
        raise _error(errno.EINVAL, path, "is not a regular file or block device")
    return False


def _open(path: str, *, is_device: bool, readonly: bool, direct: bool, alone: bool) -> int:
    flags = os.O_RDONLY if readonly else os.O_RDWR
    if direct:
        flags |= os.O_DIRECT
    if alone:
        flags |= os.O_EXCL  # of a device: unless it is mounted or claimed by another program
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno == errno.EBUSY and is_device:
            problem = "is mounted, or in use by another program"
            raise _error(errno.EBUSY, path, problem) from None
        if error.errno == errno.EINVAL and direct:
            raise _no_direct(path) from None
        raise


def _no_direct(path: str) -> OSError:
    return _error(errno.EINVAL, path, "the file system has no O_DIRECT: leave out `direct`")


def _direct_alignment(fd: int, path: str) -> int | None:
    """Return to what O_DIRECT must be aligned, None when that is not known; raises OSError."""
    alignment = direct_alignment(fd)
    if alignment == 0:
        raise _no_direct(path)
    return alignment


def _size(
    fd: int, path: str, wanted: int | None, block_size: int, *, is_device: bool, readonly: bool
) -> int:
    """Return the disk's size: of a file at least `wanted`, of a device it may be a part."""
    available = os.lseek(fd, 0, os.SEEK_END)
    size = wanted or available
    if not is_device and size < available:
        # Grown at run time, or made larger by its owner: `size` makes and grows, it never cuts.
        size = available
    if is_device and size > available:
        raise _error(errno.ENOSPC, path, f"has only {available} bytes, not {size}")
    if size == 0:
        raise _error(errno.EINVAL, path, "is empty")
    if size % block_size:
        problem = f"its size {size} is not a multiple of the block size {block_size}"
        raise _error(errno.EINVAL, path, problem)
    if size > available:
        if readonly:
            problem = f"is smaller than {size} bytes, and the disk is read-only"
            raise _error(errno.EINVAL, path, problem)
        try:
            os.ftruncate(fd, size)
        except OSError as error:
            problem = f"cannot grow to {size} bytes"
            raise _error(error.errno or errno.EIO, path, problem) from error
    return size


def _try_direct(fd: int, path: str, block_size: int) -> None:
    """Read, where the kernel does not say what that needs. A medium that is slow may be able to."""
    errors: list[OSError] = []
    own = os.dup(fd)

    def read() -> None:
        try:
            with mmap.mmap(-1, block_size) as block:
                os.preadv(own, [block], 0)
        except OSError as error:
            errors.append(error)
        finally:
            os.close(own)

    if _finishes(read, TRY_SECONDS) and errors:
        if errors[0].errno == errno.EINVAL:
            raise _no_direct(path) from None
        raise _error(errors[0].errno or errno.EIO, path, "cannot be read") from errors[0]


def _finishes(act: Callable[[], None], seconds: float) -> bool:
    """Do something that may hang, beside others who cannot wait; whether it is done by then."""
    done = threading.Event()

    def do() -> None:
        act()
        done.set()

    try:
        background.start(do)
    except OSError:  # no thread is to be had
        do()
    return done.wait(seconds)

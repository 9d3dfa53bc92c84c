"""Named shared memory that is a disk: the next worker finds its data there, several may share it.

The file is `/dev/shm/nbd-reactor-INSTANCE-NAME`: a header page, a map, then the disk. Touching a
page of the mapping that has no memory yet kills the process (SIGBUS) when /dev/shm is full. So the
map, a byte per chunk, tells in which chunks every page has memory; the others are read with
`pread`, and backed before they are written. Whatever dies where, a byte of the map may say less
than the truth, and never more.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import stat
from contextlib import suppress
from pathlib import Path
from struct import Struct
from typing import Final
from urllib.parse import quote, unquote

from backends.api import CHUNK_SHIFT, no_memory
from backends.linux import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    fallocate,
    lock_range,
    unlock_range,
)
from reactor.log import logger

DIRECTORY: Final = Path("/dev/shm")
PAGE: Final = mmap.PAGESIZE
SIZE_MAX: Final = 1 << 46  # bytes; half of what a process can map on x86-64
CHUNK: Final = 1 << CHUNK_SHIFT  # bytes; what is backed, or may have holes, as a whole
MAP: Final = PAGE  # where the map begins in the file: a byte for each chunk that there could be
DATA: Final = 1 << 31  # ... and the disk, behind the largest map
HEADER: Final = Struct("<8sIQ32s")  # magic, version, size of the disk, digest of whose it is
MAGIC: Final = b"nbdshmem"
VERSION: Final = 3
PUNCH: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python does not name it

_ZEROES: Final = memoryview(bytes(CHUNK))

log = logger(__name__)


def shared_memory(name: str, instance: str) -> Path:
    """Return the path of a disk's memory."""
    return DIRECTORY / f"nbd-reactor-{quote(instance, safe='')}-{quote(name, safe='')}"


def names(instance: str) -> list[str]:
    """Return the names of the disks that have memory."""
    prefix = shared_memory("", instance).name
    return [unquote(path.name.removeprefix(prefix)) for path in DIRECTORY.glob(f"{prefix}*")]


def remove(path: Path, identity: bytes) -> None:
    """Remove the memory of a disk, if it is that; raises OSError, and never waits."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        header = os.read(fd, HEADER.size)
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from error
    finally:
        os.close(fd)
    if any(header):
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            raise OSError(errno.EEXIST, "it is not a memory disk and is left alone", str(path))
        if HEADER.unpack(header)[3] != hashlib.sha256(identity).digest():
            raise OSError(errno.EEXIST, "it belongs to another disk and is left alone", str(path))
    path.unlink()


class SharedMemory:
    """The memory of one disk, made or found. Raises OSError with a clear text.

    `backed` has a byte per chunk: 1 when every page of the chunk has memory. It and `data` are new
    ones after a resize. `shared`: other processes use the memory at the same time. `least`: bytes
    that the disk must have; only with 0 it is made.
    """

    data: memoryview
    backed: memoryview

    def __init__(
        self, path: Path, identity: bytes, size: int, *, shared: bool, least: int = 0
    ) -> None:
        self._path = path
        self._shared = shared
        self._digest = hashlib.sha256(identity).digest()
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (0 if least else os.O_CREAT)
        try:
            self.fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            if not least:
                raise
            raise _lost(path, "is gone", least) from None
        self.made = False  # it held no disk before
        try:
            self._claim()
            found = self._size_found()
            if (found or 0) < least:
                raise _lost(path, f"has only {found or 0} bytes", least)
            self.made = found is None
            if found is None:
                self._make(size)
                found = size
            self.map(found)
            if found < size:
                # Its worker died in a resize, or its config changed while nobody served it.
                log.warning("%s is resized from %d to %d bytes", path, found, size)
                self.resize(size)
            elif found > size:
                log.warning("%s keeps its %d bytes; only a resize cuts a disk", path, found)
        except OSError as error:
            if self.made:
                path.unlink(missing_ok=True)
            os.close(self.fd)
            text = error.strerror or ""
            named = text if str(path) in text else f"{path}: {text}"
            raise OSError(error.errno, named) from error

    def close(self) -> None:
        """Let go; the memory itself stays. Views that were given out keep their mapping alive."""
        self.data = self.backed = memoryview(b"")
        del self._mapping
        os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        """Read where holes may be; a mapped read would fill them with memory. Raises OSError."""
        try:
            return os.pread(self.fd, length, DATA + offset)
        except MemoryError:
            raise no_memory() from None

    def is_backed(self, begin: int, end: int) -> bool:
        """Return whether `begin..end` has no holes."""
        return self._mapping.find(b"\0", MAP + (begin >> CHUNK_SHIFT), MAP + _chunks(end)) < 0

    def back(self, begin: int, end: int) -> None:
        """Give memory to every chunk in `begin..end`, at least to every page of that.

        Raises OSError ENOSPC when there is none.
        """
        if self.is_backed(begin, end):
            return
        first, last = begin >> CHUNK_SHIFT, _chunks(end)
        start, stop = first * CHUNK, last * CHUNK
        # With another worker trimming in there, the chunks get memory but may get holes again at
        # once: then they are not marked.
        alone = self._lock(fcntl.F_WRLCK, first, last)
        try:
            try:
                self._allocate(start, stop)
            except OSError:
                # These pages may be all that there is room for, or have their memory already.
                start, stop = begin & -PAGE, -(-end // PAGE) * PAGE
                self._allocate(start, stop)
            else:
                if alone:
                    self._mapping[MAP + first : MAP + last] = b"\1" * (last - first)
        finally:
            if alone:
                self._unlock(first, last)
        # One call instead of a fault per page; without it (an older kernel) the faults come.
        with suppress(OSError):
            self._mapping.madvise(MADV_POPULATE_WRITE, DATA + start, stop - start)

    def trim(self, begin: int, end: int) -> bool:
        """Give back the memory of the whole pages in `begin..end`; they read as zeroes.

        Nothing happens, and False is returned, while another worker gives memory to their chunks.
        """
        begin, end = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        if begin >= end:
            return True
        first, last = begin >> CHUNK_SHIFT, _chunks(end)
        if not self._lock(fcntl.F_RDLCK, first, last):
            return False
        try:
            # A worker that has looked at the map just before may write to a page that goes now,
            # only if its client has a write and a trim of one page in flight together; it takes
            # memory for the page, or is killed if there is none, which loses nothing: the next
            # worker finds the map right, and the kernel sends the write again.
            self._mapping[MAP + first : MAP + last] = bytes(last - first)
            # Not madvise(MADV_REMOVE): that fails where memory is locked.
            fallocate(self.fd, PUNCH, DATA + begin, end - begin)
        finally:
            self._unlock(first, last)
        return True

    def zero(self, begin: int, end: int) -> None:
        """Make `begin..end` zeroes, giving back the memory of whole pages."""
        first_page, last_page = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        if first_page > last_page:  # within one page
            self._write_zeroes(begin, end)
            return
        if not self.trim(first_page, last_page):
            for start in range(first_page & -CHUNK, last_page, CHUNK):
                part = max(start, first_page), min(start + CHUNK, last_page)
                if not self.trim(*part):
                    self._write_zeroes(*part)
        self._write_zeroes(begin, first_page)
        self._write_zeroes(last_page, end)

    def fill(self, begin: int, end: int) -> None:
        """Write zeroes to `begin..end`, keeping or taking the memory for them."""
        self.back(begin, end)
        for start in range(begin, end, len(_ZEROES)):
            stop = min(start + len(_ZEROES), end)
            self.data[start:stop] = _ZEROES[: stop - start]

    def resize(self, size: int) -> None:
        """Change the size of the disk; what a growing disk gains reads as zeroes.

        The file never shrinks: views of its end may still be on their way to a client, and
        touching what a truncation took away is a SIGBUS.
        """
        found = self._size_found() or 0
        self.map(found)  # all of the file
        room = len(self._mapping) - DATA
        if size < found:
            self._write_header(size)
            with suppress(OSError):  # it only gives memory back; to grow again zeroes it
                self.trim(size, room)
        elif size > found:
            self.zero(found, room)  # what an earlier shrinking left there
            self._extend(size)
        self.map(size)
        if size > found:
            self._write_header(size)

    def map(self, size: int) -> None:
        """Show `size` bytes, which the disk has."""
        # The old mapping, if any, lives as long as a view of it.
        self._mapping = mmap.mmap(self.fd, os.fstat(self.fd).st_size)
        whole = memoryview(self._mapping)
        self.data = whole[DATA : DATA + size]
        self.backed = whole[MAP : MAP + _chunks(size)]

    def _claim(self) -> None:
        status = os.fstat(self.fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"{self._path} is not ours: it exists and is another user's")
        try:
            fcntl.flock(self.fd, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{self._path} is in use by another process"
            raise OSError(errno.EBUSY, message) from None

    def _allocate(self, begin: int, end: int) -> None:
        os.posix_fallocate(self.fd, DATA + begin, end - begin)

    def _lock(self, kind: int, first: int, last: int) -> bool:
        """Keep the chunks from being given memory (F_RDLCK), or from anything else (F_WRLCK)."""
        return not self._shared or lock_range(
            self.fd, kind, DATA + first * CHUNK, (last - first) * CHUNK
        )

    def _unlock(self, first: int, last: int) -> None:
        if self._shared:
            unlock_range(self.fd, DATA + first * CHUNK, (last - first) * CHUNK)

    def _write_zeroes(self, begin: int, end: int) -> None:
        if begin < end:
            os.pwrite(self.fd, bytes(end - begin), DATA + begin)

    def _size_found(self) -> int | None:
        """Return the size of the disk that the file holds, None when it holds none yet.

        Raises OSError when what it holds is not this disk.
        """
        header = os.pread(self.fd, HEADER.size, 0)
        if not any(header):  # its maker died before it wrote the header, so before any data
            return None
        found = 0
        problem = ""
        if len(header) < HEADER.size or not header.startswith(MAGIC):
            problem = "is not a memory disk"
        else:
            _, version, found, digest = HEADER.unpack(header)
            if version != VERSION:
                problem = f"is of version {version}, not {VERSION}"
            elif digest != self._digest:
                problem = "belongs to another disk"
            elif os.fstat(self.fd).st_size < DATA + found:
                problem = "is cut short"
        if problem:
            message = f"{self._path} {problem}; remove it if its data may go"
            raise OSError(errno.EEXIST, message)
        return found

    def _make(self, size: int) -> None:
        status = os.statvfs(self.fd)
        if size > status.f_bavail * status.f_frsize:
            log.warning("%s: the disk is larger than the free memory there", self._path)
        self._extend(size)
        self._write_header(size)

    def _extend(self, size: int) -> None:
        """Make room for a disk of `size` bytes, in whole chunks, and give its map memory."""
        room = max(os.fstat(self.fd).st_size, DATA + _chunks(size) * CHUNK)
        os.ftruncate(self.fd, room)
        os.posix_fallocate(self.fd, MAP, _chunks(size))

    def _write_header(self, size: int) -> None:
        os.pwrite(self.fd, HEADER.pack(MAGIC, VERSION, size, self._digest), 0)


def _lost(path: Path, problem: str, least: int) -> OSError:
    message = (
        f"the disk's memory {path} {problem}, and had at least {least} when it was last open:"
        " a disk that is stopped, then started, gets new memory"
    )
    return OSError(errno.ENOENT, message)


def _chunks(end: int) -> int:
    """Return the number of chunks in `0..end`."""
    return (end + CHUNK - 1) >> CHUNK_SHIFT

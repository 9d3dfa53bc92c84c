"""Named shared memory that is a disk: the next worker finds its data there.

The file is `/dev/shm/nbd-reactor-INSTANCE-NAME`: a header page, then the disk. Touching a page of
the mapping that has no memory yet kills the process (SIGBUS) when /dev/shm is full. So chunks that
may have such holes are known: they are read with `pread`, and backed before they are written.
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

from backends.api import CHUNK_SHIFT
from reactor.log import logger

DIRECTORY: Final = Path("/dev/shm")
PAGE: Final = mmap.PAGESIZE
CHUNK: Final = 1 << CHUNK_SHIFT  # bytes; what is backed, or known to have holes, as a whole
HEADER: Final = Struct("<8sIQ32s")  # magic, version, size of the disk, digest of whose it is
MAGIC: Final = b"nbdshmem"
VERSION: Final = 1
MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python does not name it

log = logger(__name__)


def shared_memory(name: str, instance: str) -> Path:
    """Return the path of a disk's memory."""
    return DIRECTORY / f"nbd-reactor-{quote(instance, safe='')}-{quote(name, safe='')}"


def names(instance: str) -> list[str]:
    """Return the names of the disks that have memory."""
    prefix = shared_memory("", instance).name
    return [unquote(path.name.removeprefix(prefix)) for path in DIRECTORY.glob(f"{prefix}*")]


class SharedMemory:
    """The memory of one disk, made or found. Raises OSError with a clear text.

    `backed` has a byte per chunk: 1 when every page of the chunk is known to have memory.
    """

    def __init__(self, path: Path, identity: bytes, size: int) -> None:
        self._path = path
        self._digest = hashlib.sha256(identity).digest()
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        made = False
        try:
            self._claim()
            found = self._size_found()
            made = found is None
            if found is None:
                self._make(size)
                found = size
            self._map(found)
            self.backed = bytearray(b"\1") * _chunks(found)
            self._find_holes()
            if found != size:
                # Its worker died in a resize, or its config changed while nobody served it.
                log.warning("%s is resized from %d to %d bytes", path, found, size)
                self.resize(size)
        except OSError as error:
            if made:
                path.unlink(missing_ok=True)
            os.close(self._fd)
            text = error.strerror or ""
            named = text if str(path) in text else f"{path}: {text}"
            raise OSError(error.errno, named) from error

    def close(self) -> None:
        """Let go; the memory itself stays. Views that were given out keep their mapping alive."""
        self.data = memoryview(b"")
        del self._mapping
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """Read where holes may be; a mapped read would fill them with memory."""
        return os.pread(self._fd, length, PAGE + offset)

    def is_backed(self, begin: int, end: int) -> bool:
        """Return whether `begin..end` has no holes."""
        return self.backed.find(0, begin >> CHUNK_SHIFT, _chunks(end)) < 0

    def back(self, begin: int, end: int) -> None:
        """Give memory to every chunk in `begin..end`; raises OSError ENOSPC when there is none."""
        if self.is_backed(begin, end):
            return
        first, last = begin >> CHUNK_SHIFT, _chunks(end)
        start = PAGE + first * CHUNK
        length = PAGE + min(last * CHUNK, len(self.data)) - start
        os.posix_fallocate(self._fd, start, length)
        # One call instead of a fault per page; without it (an older kernel) the faults come.
        with suppress(OSError):
            self._mapping.madvise(MADV_POPULATE_WRITE, start, length)
        self.backed[first:last] = b"\1" * (last - first)

    def trim(self, begin: int, end: int) -> None:
        """Give back the memory of the whole pages in `begin..end`; they read as zeroes."""
        begin, end = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        if begin >= end:
            return
        first, last = begin >> CHUNK_SHIFT, min(_chunks(end), len(self.backed))
        if first < last:
            self.backed[first:last] = bytes(last - first)
        self._mapping.madvise(mmap.MADV_REMOVE, PAGE + begin, end - begin)

    def zero(self, begin: int, end: int) -> None:
        """Make `begin..end` zeroes, giving back the memory of whole pages."""
        first_page, last_page = -(-begin // PAGE) * PAGE, end // PAGE * PAGE
        if first_page > last_page:  # within one page
            os.pwrite(self._fd, bytes(end - begin), PAGE + begin)
            return
        self.trim(begin, end)
        if begin < first_page:
            os.pwrite(self._fd, bytes(first_page - begin), PAGE + begin)
        if last_page < end:
            os.pwrite(self._fd, bytes(end - last_page), PAGE + last_page)

    def fill(self, begin: int, end: int) -> None:
        """Write zeroes to `begin..end`, keeping or taking the memory for them."""
        self.back(begin, end)
        self.data[begin:end] = bytes(end - begin)

    def resize(self, size: int) -> None:
        """Change the size of the disk; what a growing disk gains reads as zeroes.

        The file never shrinks: views of its end may still be on their way to a client, and
        touching what a truncation took away is a SIGBUS.
        """
        old = len(self.data)
        room = os.fstat(self._fd).st_size - PAGE
        if size < old:
            self._write_header(size)
            self.trim(size, room)
        else:
            self.zero(old, room)  # what an earlier shrinking left there
            if size > room:
                os.ftruncate(self._fd, PAGE + size)
        self._map(size)
        if size > old:
            self._write_header(size)
        kept = min(size, old) >> CHUNK_SHIFT
        self.backed[kept:] = bytes(_chunks(size) - kept)

    def _claim(self) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"{self._path} is not ours: it exists and is another user's")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"{self._path} is in use by another process"
            raise OSError(errno.EBUSY, message) from None

    def _size_found(self) -> int | None:
        """Return the size of the disk that the file holds, None when it holds none yet.

        Raises OSError when what it holds is not this disk.
        """
        header = os.pread(self._fd, HEADER.size, 0)
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
            elif os.fstat(self._fd).st_size < PAGE + found:
                problem = "is cut short"
        if problem:
            message = f"{self._path} {problem}; remove it if its data may go"
            raise OSError(errno.EEXIST, message)
        return found

    def _make(self, size: int) -> None:
        status = os.statvfs(self._fd)
        if size > status.f_bavail * status.f_frsize:
            log.warning("%s: the disk is larger than the free memory there", self._path)
        os.ftruncate(self._fd, PAGE + size)
        self._write_header(size)

    def _write_header(self, size: int) -> None:
        os.pwrite(self._fd, HEADER.pack(MAGIC, VERSION, size, self._digest), 0)

    def _map(self, size: int) -> None:
        # The old mapping, if any, lives as long as a view of it.
        self._mapping = mmap.mmap(self._fd, os.fstat(self._fd).st_size)
        self.data = memoryview(self._mapping)[PAGE : PAGE + size]

    def _find_holes(self) -> None:
        position, end = PAGE, PAGE + len(self.data)
        while (hole := os.lseek(self._fd, position, os.SEEK_HOLE)) < end:
            try:
                data = min(os.lseek(self._fd, hole, os.SEEK_DATA), end)
            except OSError as error:
                if error.errno != errno.ENXIO:
                    raise
                data = end  # no more data
            first, last = (hole - PAGE) >> CHUNK_SHIFT, _chunks(data - PAGE)
            self.backed[first:last] = bytes(last - first)
            position = PAGE + last * CHUNK  # one hole says all about its chunk
            if position >= end:
                break


def _chunks(end: int) -> int:
    """Return the number of chunks in `0..end`."""
    return (end + CHUNK - 1) >> CHUNK_SHIFT

"""Disks on a regular file or a block device of the host."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from backends.api import Backend, Channel, Disk, Event
from backends.filechannel import FileChannel
from backends.filelock import mark_of
from backends.fileopen import SMALLEST_BLOCK, OpenFile, open_file, try_to_read
from backends.linux import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    can_discard,
    device_size,
    fallocate,
)
from reactor.loop import Reactor, Timer
from reactor.spec import Key

WATCH_SECONDS: Final = 1.0  # how often the file is looked at, to see that it is still there
AGAIN_SECONDS: Final = 0.1  # in which a worker that was killed has closed all it had open


class FileDisk(Disk):
    """An open file. When it is deleted, replaced, cut short or unplugged, the disk is removed."""

    can_multi_conn = True  # one fdatasync covers the writes of all
    can_share = True  # ... also those of other processes, and they have one page cache
    can_fua = True

    def __init__(self, name: str, opened: OpenFile, reactor: Reactor, *, readonly: bool) -> None:
        super().__init__(name, opened.size, opened.block_size, readonly=readonly)
        self.path = opened.path
        self.fd = self.lock_fd = opened.fd
        self._opened = opened
        self.channels: list[FileChannel] = []
        self._taken = False  # another program seems to have the device
        self.is_device = opened.is_device
        self.direct = opened.direct
        self.sync_error = 0  # the errno with which data was lost; see FileChannel
        self._identity = _identity(os.fstat(self.fd))
        self.can_nowait = _can_nowait(self.fd)
        if not readonly:
            self._find_capabilities()
        self._reactor = reactor
        self._removed = False
        self._suspicion: Timer | None = None
        self._watch_timer = reactor.call_later(WATCH_SECONDS, self._watch)

    def channel(self, reactor: Reactor) -> Channel:
        return FileChannel(self, reactor)

    def resize(self, size: int) -> None:
        """Change the size: of a regular file itself, of a device only what is shown of it."""
        if self.is_device:
            available = device_size(self.fd)
            if size > available:
                problem = f"the device has only {available} bytes"
                raise OSError(errno.ENOSPC, problem, self.path)
        elif self.readonly:
            raise OSError(errno.EPERM, "the disk is read-only", self.path)
        elif size > self.size and (now := os.fstat(self.fd).st_size) > size:
            problem = f"the file has {now} bytes by now, and is not cut: resize the disk to as many"
            raise OSError(errno.EINVAL, problem, self.path)
        else:
            os.ftruncate(self.fd, size)
        self.size = size

    def suspect(self) -> None:
        """Look soon whether the file is still there: something failed."""
        # Not at once: who hears of the removal may be in the middle of submitting.
        if self._suspicion is None and not self._removed:
            self._suspicion = self._reactor.call_later(0, self._look_again)

    def close(self) -> None:
        self._watch_timer.cancel()
        if self._suspicion is not None:
            self._suspicion.cancel()
        self._opened.close()

    def _find_capabilities(self) -> None:
        if self.is_device:
            self.can_trim = can_discard(os.fstat(self.fd).st_rdev)
            self.can_write_zeroes = True  # the kernel writes them where the device cannot
            return
        try:  # beyond the end there is nothing to lose
            end = -(-self.size // 4096) * 4096
            fallocate(self.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, end, 4096)
        except OSError:
            return
        self.can_trim = self.can_write_zeroes = True

    def _watch(self) -> None:
        # All files at the same moment: an idle worker wakes up once for them, and its heartbeat.
        seconds = WATCH_SECONDS - self._reactor.clock() / 1e9 % WATCH_SECONDS
        self._watch_timer = self._reactor.call_later(seconds, self._watch)
        was_taken, self._taken = self._taken, self._is_taken()
        if self._taken and not was_taken:
            self._watch_timer.cancel()
            self._watch_timer = self._reactor.call_later(AGAIN_SECONDS, self._watch)
        if self._taken and was_taken:
            self._remove("was taken by another program when the worker that held it had died")
        for channel in self.channels:
            channel.look()
        self._look()

    def _look_again(self) -> None:
        self._suspicion = None
        self._look()

    def _look(self) -> None:
        if self._removed:
            return
        problem = self._problem()
        if problem:
            self._remove(problem)

    def _remove(self, problem: str) -> None:
        self._removed = True
        self._watch_timer.cancel()
        self.notify(Event.REMOVE, f"{self.path} {problem}")

    def _is_taken(self) -> bool:
        # The worker that holds the device for all may have died: until one of the others has seen
        # it, for a second, it is free to be taken.
        try:
            if self._opened.claim is not None:
                self._opened.claim.keep()
        except OSError as error:  # what else there may be is tried again
            return error.errno == errno.EBUSY
        return False

    def _problem(self) -> str | None:
        """Return what has become of the file, None while all is well."""
        try:
            size = device_size(self.fd) if self.is_device else os.lseek(self.fd, 0, os.SEEK_END)
        except OSError as error:
            return f"is gone: {error.strerror}"
        if self.is_device and size == 0:
            return "is gone: the device was unplugged or removed"
        if size < self.size:
            return f"shrank from {self.size} to {size} bytes"
        try:
            now = _identity(Path(self.path).stat())
        except (FileNotFoundError, NotADirectoryError):
            return "was deleted"
        except OSError:  # a path that cannot be followed now says nothing about the file
            return None
        return None if now == self._identity else "was replaced"


class FileBackend(Backend):
    """A regular file or block device."""

    name = "file"
    product_name = "AIO disk"
    about = "a regular file or a block device"
    disk = FileDisk
    keys = (
        Key(
            "path",
            "path",
            required=True,
            meaning="the file or device; a relative path starts at the folder of `disks.yaml`",
        ),
        Key(
            "size",
            "size",
            meaning="create or grow a regular file to it, never cut it; without it, the file's own",
        ),
        Key("direct", "boolean", meaning="`true` for `O_DIRECT`, past the page cache"),
    )

    @classmethod
    def check(cls, options: Mapping[str, object], block_size: int | None) -> list[tuple[str, str]]:
        size = options.get("size")
        unit = block_size or SMALLEST_BLOCK
        if not isinstance(size, int):
            return []
        if size <= 0:
            return [("size", "must be more than 0")]
        if size % unit:
            return [("size", f"{size} is not a multiple of the block size {unit}")]
        return []

    @classmethod
    def await_storage(cls, options: Mapping[str, object]) -> None:
        try_to_read(str(options["path"]))

    @classmethod
    def create(
        cls,
        name: str,
        options: Mapping[str, object],
        *,
        instance: str,
        reactor: Reactor,
        block_size: int | None,
        readonly: bool,
        shared: bool,
        least: int = 0,
    ) -> Disk:
        sharers = mark_of(name, instance) if shared else None
        opened = open_file(
            options, block_size=block_size, readonly=readonly, sharers=sharers, least=least
        )
        try:
            return FileDisk(name, opened, reactor, readonly=readonly)
        except BaseException:
            opened.close()
            raise


def _identity(status: os.stat_result) -> tuple[int, int]:
    # A device node may be made anew for the same device.
    if stat.S_ISBLK(status.st_mode):
        return 0, status.st_rdev
    return status.st_dev, status.st_ino


def _can_nowait(fd: int) -> bool:
    try:
        os.preadv(fd, (bytearray(1),), 0, os.RWF_NOWAIT)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True


BACKEND = FileBackend

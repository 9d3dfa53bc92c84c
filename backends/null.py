"""Reads zeroes and forgets what is written: for measuring everything else."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Mapping
from typing import Final

from backends.api import COMMAND, DONE, LENGTH, Backend, Buffer, Channel, Disk, Owner, Request
from reactor.loop import Reactor
from reactor.protocol.wire import MAX_PAYLOAD, NBD_CMD_READ
from reactor.spec import Key
from reactor.units import format_size

BLOCK_SIZE: Final = 512
DEFAULT_SIZE: Final = 1 << 30  # bytes
# Never written, so it takes no memory; nor could it be, so that none is set aside for it.
_ZEROES: Final = memoryview(mmap.mmap(-1, MAX_PAYLOAD, mmap.MAP_PRIVATE, mmap.PROT_READ))


class NullChannel(Channel):
    """Answers everything at once."""

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        return _ZEROES[: request[LENGTH]] if request[COMMAND] == NBD_CMD_READ else DONE


class NullDisk(Disk):
    """A disk without storage."""

    can_share = True
    can_multi_conn = True
    can_trim = True
    can_write_zeroes = True
    can_fua = True

    def channel(self, reactor: Reactor) -> Channel:
        return NullChannel(self)

    def resize(self, size: int) -> None:
        self.size = size


class NullBackend(Backend):
    """Makes null disks."""

    name = "null"
    product_name = "Null disk"
    about = "reads zeroes, forgets writes: for measuring everything else"
    keys = (Key("size", "size", meaning=f"`{format_size(DEFAULT_SIZE)}` unless it is given"),)
    disk = NullDisk

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
        size = options.get("size", DEFAULT_SIZE)
        assert isinstance(size, int)
        block_size = block_size or BLOCK_SIZE
        if size <= 0 or size % block_size:
            message = f"{size} bytes is not a positive multiple of the block size {block_size}"
            raise OSError(errno.EINVAL, message)
        return NullDisk(name, size, block_size, readonly=readonly)


BACKEND = NullBackend

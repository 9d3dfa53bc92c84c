"""A disk in shared memory, which its worker maps: reads and writes are copies, nothing else."""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Mapping
from typing import Final

from backends import sharedmemory
from backends.api import COMMAND, DONE, FLAGS, Backend, Buffer, Channel, Disk, Owner, Request
from backends.sharedmemory import CHUNK, SIZE_MAX, SharedMemory, shared_memory
from backends.turns import SHARING, TURN_BYTES
from reactor.errors import error_number
from reactor.loop import Reactor
from reactor.protocol.wire import (
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from reactor.spec import Key

BLOCK_SIZE: Final = 512
NEW: Final = 3  # as long as so many bytes take, a byte of memory takes that is new
SHORT: Final = 64 << 10  # bytes that are zeroed or trimmed at once, as long as the turn has room


class MallocChannel(Channel):
    """Answers at once, but for what makes, clears or copies much: that goes on turn by turn."""

    def __init__(self, disk: MallocDisk, reactor: Reactor) -> None:
        super().__init__(disk)
        self.kick_due = False
        self.memory = self._memory = disk.memory
        self._reactor = reactor
        self._room = TURN_BYTES  # that may still be cleared, made or copied in this turn
        self._long: deque[tuple[Request, Owner, int]] = deque()  # ... and where to go on

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        command, _flags, _cookie, offset, length, payload = request
        end = offset + length
        memory = self._memory
        if command <= NBD_CMD_WRITE:
            backed = memory.is_backed(offset, end)
            if command == NBD_CMD_READ:
                if backed:
                    return memory.data[offset:end]
                self._take_room(owner, length)
                return memory.read(offset, length)
            if not backed:
                self._take_room(owner, NEW * max(length, CHUNK))
                memory.back(offset, end)
            assert payload is not None
            memory.data[offset:end] = payload
        elif command in {NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES}:
            self._reactor.mark_kick(self)
            if length > min(SHORT, self._room):
                self._long.append((request, owner, offset))
                return None
            self._room -= length * _weight(request)
            self._clear(request, offset, end)
        return DONE

    def kick(self) -> None:
        """Do one step of what is queued: of one long request, or of several shorter ones.

        Then those who wait to write to new memory, or to read where there may be none, by turns.
        """
        self._room = TURN_BYTES
        room = TURN_BYTES
        while self._long and room > 0:
            room -= self._do_step(room)
        if self._waiting:
            self._room = TURN_BYTES // max(1, len(SHARING))
        while self._waiting and self._room > 0:
            self._waiting.popleft().resume()
        if not self._waiting:
            SHARING.discard(self)
        if self._long or self._waiting:
            self._reactor.mark_kick(self)

    def _take_room(self, owner: Owner, count: int) -> None:
        """Use so many bytes of the turn's room; raises `Busy` when there is none."""
        self._reactor.mark_kick(self)
        if self._room <= 0:
            SHARING.add(self)
            raise self.refuse(owner)
        self._room -= count

    def close(self) -> None:
        SHARING.discard(self)

    def abandon(self, owner: Owner) -> None:
        if owner in self._waiting:
            self._waiting.remove(owner)
        long, self._long = self._long, deque()
        for request, other, begin in long:
            if other is owner:
                owner.complete(request, errno.ESHUTDOWN, DONE)
            else:
                self._long.append((request, other, begin))

    def _do_step(self, most: int) -> int:
        """Do a part of the first request, for `most` bytes' time, and queue it last.

        Returns for how many bytes' time.
        """
        request, owner, begin = self._long.popleft()
        _command, _flags, _cookie, offset, length, _payload = request
        weight = _weight(request)
        end = min(begin + max(most // weight, BLOCK_SIZE), offset + length)
        try:
            self._clear(request, begin, end)
        except Exception as error:  # noqa: BLE001 - no request may be left without an end
            owner.complete(request, error_number(error), DONE)
        else:
            if end == offset + length:
                owner.complete(request, 0, DONE)
            else:
                self._long.append((request, owner, end))
        return (end - begin) * weight

    def _clear(self, request: Request, begin: int, end: int) -> None:
        end = min(end, len(self._memory.data))  # the disk may have shrunk between the steps
        if begin >= end:
            return
        if request[COMMAND] == NBD_CMD_TRIM:
            self._memory.trim(begin, end)
        elif request[FLAGS] & NBD_CMD_FLAG_NO_HOLE:
            self._memory.fill(begin, end)
        else:
            self._memory.zero(begin, end)


class MallocDisk(Disk):
    """A memory disk. Memory needs no flush, and every channel in every process sees the same."""

    can_share = True
    can_multi_conn = True
    can_trim = True
    can_write_zeroes = True
    can_fua = True

    def __init__(
        self, name: str, size: int, block_size: int, *, readonly: bool, memory: SharedMemory
    ) -> None:
        super().__init__(name, size, block_size, readonly=readonly)
        self.made = memory.made
        self.memory = memory
        self.lock_fd = memory.fd

    def channel(self, reactor: Reactor) -> Channel:
        return MallocChannel(self, reactor)

    def resize(self, size: int) -> None:
        _check_size(size, self.block_size)
        self.memory.resize(size)
        self.size = size

    def follow(self, size: int) -> None:
        self.memory.map(size)
        self.size = size

    def close(self) -> None:
        self.memory.close()


class MallocBackend(Backend):
    """Makes memory disks."""

    name = "malloc"
    product_name = "Malloc disk"
    about = "memory that outlives every process of the service, but not a stop"
    keys = (Key("size", "size", required=True, meaning="how much memory"),)
    disk = MallocDisk

    @classmethod
    def check(cls, options: Mapping[str, object], block_size: int | None) -> list[tuple[str, str]]:
        size = options["size"]
        assert isinstance(size, int)
        if size > SIZE_MAX:
            return [("size", f"{size} is more than a memory disk can have, {SIZE_MAX} bytes")]
        return []

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
        size = options["size"]
        assert isinstance(size, int)
        block_size = block_size or BLOCK_SIZE
        _check_size(size, block_size)
        path, identity = shared_memory(name, instance), _identity(name, instance)
        memory = SharedMemory(path, identity, size, shared=shared, least=least)
        return MallocDisk(name, len(memory.data), block_size, readonly=readonly, memory=memory)

    @classmethod
    def discard(cls, name: str, instance: str) -> None:
        sharedmemory.remove(shared_memory(name, instance), _identity(name, instance))

    @classmethod
    def leftovers(cls, instance: str) -> list[str]:
        return sharedmemory.names(instance)


def _weight(request: Request) -> int:
    """Return as how many bytes each is counted of a request that trims or zeroes."""
    return NEW if request[FLAGS] & NBD_CMD_FLAG_NO_HOLE else 1


def _identity(name: str, instance: str) -> bytes:
    return f"{instance}\0{name}".encode()


def _check_size(size: int, block_size: int) -> None:
    if size <= 0 or size % block_size:
        message = f"{size} bytes is not a positive multiple of the block size {block_size}"
        raise OSError(errno.EINVAL, message)
    if size > SIZE_MAX:
        raise OSError(errno.EFBIG, f"{size} bytes is more than {SIZE_MAX}")


BACKEND = MallocBackend

"""The requests of one worker to a file: the page cache at once, everything else off the loop."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

from backends.api import (
    DONE,
    FLAGS,
    LENGTH,
    OFFSET,
    PAYLOAD,
    Buffer,
    Channel,
    Owner,
    Request,
    no_memory,
)
from backends.buffers import AlignedBuffer, BufferPool
from backends.engine import Engine, OnRoom, Tag
from backends.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, discard
from backends.slowness import Slowness
from backends.threads import Threads
from backends.turns import SHARING, TURN_BYTES
from backends.uring import Ring
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import Reactor
from reactor.protocol.wire import (
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
)

if TYPE_CHECKING:
    from backends.file import FileDisk

# A call that should only touch memory but took longer than this (and one ns per byte) has waited
# for the disk: the kernel throttles writers whose dirty pages are too many. For a while such calls
# go to the engine, so that a slow disk costs the loop one short wait a second and not one per
# request, and a tenth of its time at most. So they do while anything else waits for the disk.
STALL_NS: Final = 5_000_000
STALLED_FOR_NS: Final = 1_000_000_000
STALLED_FOR_WAITS: Final = 10
LOOK_NS: Final = 2_500_000_000  # longer than from one look at the storage to the next

PAGE_REST: Final = mmap.PAGESIZE - 1
# From so many bytes on data of the page cache goes through a pooled buffer: fresh memory, zeroed
# and given back each time, would cost three times as much as the copy (at 128 KiB).
POOLED_MIN: Final = 64 << 10

PUNCH: Final = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO: Final = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
ALLOCATE: Final = FALLOC_FL_KEEP_SIZE
# What does the same in several steps where one call is not supported (EOPNOTSUPP).
INSTEAD_ON_FILES: Final = {ZERO: (PUNCH, ALLOCATE)}
INSTEAD_ON_DEVICES: Final = {PUNCH: (ZERO,)}

log = logger(__name__)
_warned: set[str] = set()


def open_engine(reactor: Reactor, fd: int, on_room: OnRoom) -> Engine:
    """Return io_uring for `fd`, or threads where the kernel or a sandbox refuses it."""
    try:
        return Ring(reactor, fd, on_room)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOMEM):
            raise
        if not _warned:
            _warned.add("io_uring")
            log.warning("no io_uring (%s): slower threads do the I/O of files", reason(error))
        return Threads(reactor, fd, on_room)


class FileChannel(Channel):
    """Buffered: hits in the page cache are answered at once. Direct: everything is pending."""

    def __init__(
        self,
        disk: FileDisk,
        reactor: Reactor,
        make_engine: Callable[[Reactor, int, OnRoom], Engine] = open_engine,
    ) -> None:
        super().__init__(disk)
        self.kick_due = False
        self._file = disk
        self._fd = disk.fd
        self._reactor = reactor
        self._clock = reactor.clock
        self._pool = BufferPool(self._on_room)
        self._engine = make_engine(reactor, disk.fd, self._on_room)
        self._discards = Threads(reactor, disk.fd, self._on_room, threads=1)
        self._slowness = Slowness(disk.name, reactor.clock, (self._engine, self._discards))
        disk.channels.append(self)
        self._resuming = False
        self._ready: list[tuple[Request, Owner, AlignedBuffer]] = []  # reads done in this turn
        self._room = TURN_BYTES  # that may still be read in this turn in large reads
        self._byte = bytearray(1)  # which nobody looks at
        self._stalled_until = 0
        self._instead: Mapping[int, tuple[int, ...]] = (
            INSTEAD_ON_DEVICES if disk.is_device else INSTEAD_ON_FILES
        )
        self._syncing: list[tuple[Request, Owner]] = []  # one fdatasync answers them all
        self._sync_round = 0
        self._next_sync: list[tuple[Request, Owner]] = []
        if disk.direct:
            self._read: Callable[[Request, Owner], Buffer | None] = self._queue_read
            self._write: Callable[[Request, Owner], Buffer | None] = self._queue_write
        else:
            self._read = self._read_cached if disk.can_nowait else self._read_guarded
            self._write = self._write_cached

    def submit(self, request: Request, owner: Owner) -> Buffer | None:
        command = request[0]
        if command == NBD_CMD_READ:
            return self._read(request, owner)
        if command == NBD_CMD_WRITE:
            return self._write(request, owner)
        if command == NBD_CMD_FLUSH:
            self._flush(request, owner)
        elif not request[LENGTH] or (command == NBD_CMD_CACHE and self._file.direct):
            return DONE
        elif command == NBD_CMD_TRIM:
            self._trim(request, owner)
        elif command == NBD_CMD_CACHE:
            self._cache(request, owner)
        else:
            self._write_zeroes(request, owner)
        return None

    def kick(self) -> None:
        """Answer what was read, and let those who were refused try again.

        Whoever finds no buffer, or no place in the queue, stays first, or a large request would
        starve.
        """
        ready, self._ready = self._ready, []
        for request, owner, buffer in ready:
            owner.complete(request, 0, buffer.view[: request[LENGTH]], buffer)
        self._room = TURN_BYTES // max(1, len(SHARING))
        while self._waiting:
            owner = self._waiting.popleft()
            self._resuming = True
            try:
                owner.resume()
            finally:
                self._resuming = False
            if self._room <= 0 and self._waiting:  # it had its part of the turn, and waits last
                self._reactor.mark_kick(self)
                return
            if owner in self._waiting:
                self._waiting.remove(owner)
                self._waiting.appendleft(owner)
                break
        SHARING.discard(self)

    def look(self) -> None:
        """See whether the storage is slow; called every second."""
        if self._slowness.look():
            self._stalled_until = max(self._stalled_until, self._clock() + LOOK_NS)

    def rest(self) -> None:
        self._pool.drop_free()

    def close(self) -> None:
        SHARING.discard(self)
        self._file.channels.remove(self)
        self._engine.close()
        self._discards.close()

    # --- room ---

    def _admit(self, engine: Engine, owner: Owner) -> None:
        if engine.in_flight >= engine.depth or (self._waiting and not self._resuming):
            raise self.refuse(owner)

    def _buffer(self, length: int, owner: Owner) -> AlignedBuffer:
        engine = self._engine
        # As in _admit, without its call.
        if engine.in_flight >= engine.depth or (self._waiting and not self._resuming):
            raise self.refuse(owner)
        buffer = self._pool.take(length)
        if buffer is None:
            raise self.refuse(owner)
        return buffer

    def _on_room(self) -> None:
        if self._waiting:
            self._reactor.mark_kick(self)

    # --- reads ---

    def _read_cached(self, request: Request, owner: Owner) -> Buffer | None:
        length = request[LENGTH]
        if length >= POOLED_MIN:
            self._read_pooled(request, owner, os.RWF_NOWAIT)
            return None
        # A new bytearray each time: replies go out by reference, at the end of the turn. It costs
        # 0.3 us more than os.pread, which could wait for the disk.
        try:
            data = bytearray(length)
        except MemoryError:
            raise no_memory() from None
        try:
            if os.preadv(self._fd, (data,), request[OFFSET], os.RWF_NOWAIT) == length:
                return data
        except BlockingIOError:
            pass
        except OSError:
            self._file.suspect()
            raise
        self._queue_read(request, owner)
        return None

    def _read_pooled(self, request: Request, owner: Owner, flags: int) -> None:
        """Read into a pooled buffer, as much as `flags` (RWF_*) allow, and the rest by the engine.

        What is there at once is answered by the next `kick`: its buffer is only lent.
        """
        length = request[LENGTH]
        if self._room <= 0:
            SHARING.add(self)
            raise self.refuse(owner)
        buffer = self._buffer(length, owner)
        try:
            done = os.preadv(self._fd, (buffer.view[:length],), request[OFFSET], flags)
        except BlockingIOError:
            done = 0
        except OSError:
            buffer.release()
            self._file.suspect()
            raise
        if done:
            self._room -= done
            self._reactor.mark_kick(self)
        if done == length:
            self._ready.append((request, owner, buffer))
        else:
            self._continue_read(request, owner, buffer, done - done % self.disk.block_size)

    def _read_guarded(self, request: Request, owner: Owner) -> Buffer | None:
        """Read from a file system without RWF_NOWAIT, which may or may not be memory."""
        began = self._clock()
        if began < self._stalled_until:
            self._queue_read(request, owner)
            return None
        length = request[LENGTH]
        if length >= POOLED_MIN:
            self._read_pooled(request, owner, 0)
            self._note_stall(began, length)
            return None
        try:
            data = os.pread(self._fd, length, request[OFFSET])
        except MemoryError:
            raise no_memory() from None
        except OSError:
            self._file.suspect()
            raise
        self._note_stall(began, length)
        if len(data) == length:
            return data
        self._queue_read(request, owner)
        return None

    def _queue_read(self, request: Request, owner: Owner) -> None:
        self._continue_read(request, owner, self._buffer(request[LENGTH], owner), 0)

    def _continue_read(
        self, request: Request, owner: Owner, buffer: AlignedBuffer, start: int
    ) -> None:
        tag = (self._read_done, request, owner, buffer, start)
        length, offset = request[LENGTH] - start, request[OFFSET] + start
        self._engine.read(buffer, start, length, offset, tag)

    def _read_done(self, result: int, tag: Tag) -> None:
        _, request, owner, buffer, start = tag
        length = request[LENGTH]
        done = start + result
        if done == length:
            owner.complete(request, 0, buffer.view[:length], buffer)
        elif result > 0 and not result % self.disk.block_size:  # else it is the end of the file
            self._continue_read(request, owner, buffer, done)
        else:
            buffer.release()
            self._fail(request, owner, -min(result, 0) or errno.EIO)

    # --- writes ---

    def _write_cached(self, request: Request, owner: Owner) -> Buffer | None:
        began = self._clock()
        if request[FLAGS] & NBD_CMD_FLAG_FUA or began < self._stalled_until:
            self._queue_write(request, owner)
            return None
        payload = request[PAYLOAD]
        assert payload is not None
        length, offset = request[LENGTH], request[OFFSET]
        try:
            if (offset | length) & PAGE_REST and not self._has_edges(offset, offset + length):
                self._queue_write(request, owner)
                return None
            done = os.pwrite(self._fd, payload, offset)
            while done < length:  # short: the next part fails, and says why
                part = os.pwrite(self._fd, payload[done:], offset + done)
                if not part:
                    raise OSError(errno.EIO, "nothing was written")
                done += part
        except OSError:
            self._file.suspect()
            raise
        self._note_stall(began, length)
        return DONE

    def _has_edges(self, begin: int, end: int) -> bool:
        """Return whether the pages of which only a part is in begin..end are in the page cache.

        To write to others the kernel would read them first, and make us wait for the disk.
        """
        if not self._file.can_nowait:
            return True  # as far as anyone can tell
        try:
            for edge in (begin, end):
                if edge & PAGE_REST:
                    os.preadv(self._fd, (self._byte,), edge & ~PAGE_REST, os.RWF_NOWAIT)
        except BlockingIOError:
            return False
        return True

    def _queue_write(self, request: Request, owner: Owner) -> None:
        payload = request[PAYLOAD]
        assert payload is not None
        if request[FLAGS] & NBD_CMD_FLAG_FUA:
            self._refuse_after_failed_sync()
        length = request[LENGTH]
        buffer = self._buffer(length, owner)
        buffer.view[:length] = payload
        self._continue_write(request, owner, buffer, 0)

    def _continue_write(
        self, request: Request, owner: Owner, buffer: AlignedBuffer, start: int
    ) -> None:
        # With the page cache it would also take the error of earlier writes, as if it were its own.
        durable = self._file.direct and request[FLAGS] & NBD_CMD_FLAG_FUA
        flags = os.RWF_DSYNC if durable else 0
        tag = (self._write_done, request, owner, buffer, start)
        offset = request[OFFSET] + start
        self._engine.write(buffer, start, request[LENGTH] - start, offset, flags, tag)

    def _write_done(self, result: int, tag: Tag) -> None:
        _, request, owner, buffer, start = tag
        done = start + result
        if done == request[LENGTH]:
            buffer.release()
            if self._file.direct:
                owner.complete(request, 0, DONE)
            else:
                self._end(request, owner, 0)
        elif result > 0:
            self._continue_write(request, owner, buffer, done)
        else:
            buffer.release()
            if result == -errno.EIO and self._file.direct and request[FLAGS] & NBD_CMD_FLAG_FUA:
                self._note_failed_sync(errno.EIO)
            self._fail(request, owner, -result or errno.EIO)

    def _note_stall(self, began: int, length: int) -> None:
        now = self._clock()
        waited = now - began
        if waited > STALL_NS + length:
            self._stalled_until = now + max(STALLED_FOR_NS, STALLED_FOR_WAITS * waited)
            self._slowness.report(waited, f"kept a whole worker waiting for {waited / 1e9:.0f} s")

    # --- flushes ---

    def _flush(self, request: Request, owner: Owner) -> None:
        self._refuse_after_failed_sync()
        self._join_sync(request, owner)

    def _join_sync(self, request: Request, owner: Owner) -> None:
        """Join the fdatasync that has not started yet: a running one may miss finished writes.

        There is one at a time, for which the engine always has a place: a trim that must be durable
        may have ended on the other engine while this one is full.
        """
        if not self._syncing:
            self._syncing = [(request, owner)]
            try:
                self._start_sync()
            except MemoryError:
                self._syncing = []  # nobody is to join what does not run
                raise
        elif self._sync_round == self._engine.rounds:
            self._syncing.append((request, owner))
        else:
            self._next_sync.append((request, owner))

    def _start_sync(self) -> None:
        self._sync_round = self._engine.rounds
        self._engine.datasync((self._sync_done,))

    def _sync_done(self, result: int, _tag: Tag) -> None:
        answered = self._syncing
        self._syncing, self._next_sync = self._next_sync, []
        if result < 0:
            self._note_failed_sync(-result)
            self._file.suspect()
            if self._file.sync_error:  # later success would be a lie for these as well
                answered += self._syncing
                self._syncing = []
        if self._syncing:
            self._start_sync()
        for request, owner in answered:
            owner.complete(request, -result, DONE)

    def _note_failed_sync(self, number: int) -> None:
        """Remember that data is lost.

        After a failed write-back the kernel marks the pages clean and reports the error once: a
        later fdatasync would succeed without the data ("fsyncgate"). Nothing lies in the page
        cache with O_DIRECT, so there the next one may be believed.
        """
        log.error("disk %s: data may be lost: fdatasync: %s", self.disk.name, os.strerror(number))
        if not self._file.direct:
            self._file.sync_error = number

    def _refuse_after_failed_sync(self) -> None:
        if self._file.sync_error:
            raise OSError(self._file.sync_error, "an earlier fdatasync failed, data is lost")

    # --- trims and zeroes ---

    def _trim(self, request: Request, owner: Owner) -> None:
        tag = (self._trimmed, request, owner)
        offset, length = request[OFFSET], request[LENGTH]
        if self._file.is_device:
            self._admit(self._discards, owner)
            self._discards.call(discard, (self._fd, offset, length), tag)
        else:
            self._admit(self._engine, owner)
            self._engine.allocate(PUNCH, offset, length, tag)

    def _trimmed(self, result: int, tag: Tag) -> None:
        _, request, owner = tag
        self._end(request, owner, result)

    def _write_zeroes(self, request: Request, owner: Owner) -> None:
        self._admit(self._engine, owner)
        mode = ZERO if request[FLAGS] & NBD_CMD_FLAG_NO_HOLE else PUNCH
        self._allocate(request, owner, (mode,))

    def _allocate(self, request: Request, owner: Owner, modes: tuple[int, ...]) -> None:
        tag = (self._zeroed, request, owner, modes)
        self._engine.allocate(modes[0], request[OFFSET], request[LENGTH], tag)

    def _zeroed(self, result: int, tag: Tag) -> None:
        _, request, owner, modes = tag
        following = modes[1:]
        if result == -errno.EOPNOTSUPP:
            following = self._instead.get(modes[0], ())
        elif result < 0:
            following = ()
        if following:
            self._allocate(request, owner, following)
        else:
            self._end(request, owner, result)

    def _end(self, request: Request, owner: Owner, result: int) -> None:
        """Answer, after an fdatasync when success must be durable (FUA)."""
        if result < 0:
            self._fail(request, owner, -result)
        elif not request[FLAGS] & NBD_CMD_FLAG_FUA:
            owner.complete(request, 0, DONE)
        elif self._file.sync_error:
            owner.complete(request, self._file.sync_error, DONE)
        else:
            self._join_sync(request, owner)

    # --- the rest ---

    def _cache(self, request: Request, owner: Owner) -> None:
        self._admit(self._engine, owner)
        tag = (self._cached, request, owner)
        self._engine.will_need(request[OFFSET], request[LENGTH], tag)

    def _cached(self, _result: int, tag: Tag) -> None:
        _, request, owner = tag
        owner.complete(request, 0, DONE)  # a hint: whether it could be followed is no matter

    def _fail(self, request: Request, owner: Owner, number: int) -> None:
        self._file.suspect()
        owner.complete(request, number, DONE)

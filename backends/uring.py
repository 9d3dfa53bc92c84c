"""A small binding to io_uring: a ring for one file, entered once for several operations.

The interface is the kernel's include/uapi/linux/io_uring.h. No SQPOLL: its thread would take a
core away from a worker. Everything here happens in the reactor's thread.
"""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import os
import select
from struct import Struct
from typing import Final

from backends.buffers import AlignedBuffer
from backends.engine import ENTRIES, Engine, OnRoom, Tag
from reactor.loop import Reactor

SYS_IO_URING_SETUP: Final = 425  # the same on every architecture but alpha
SYS_IO_URING_ENTER: Final = 426
SYS_IO_URING_REGISTER: Final = 427

IORING_SETUP_CLAMP: Final = 1 << 4
IORING_SETUP_TASKRUN_FLAG: Final = 1 << 9
IORING_SETUP_SINGLE_ISSUER: Final = 1 << 12
IORING_SETUP_DEFER_TASKRUN: Final = 1 << 13  # Linux 6.1
IORING_FEAT_SINGLE_MMAP: Final = 1 << 0
IORING_FEAT_RW_CUR_POS: Final = 1 << 3  # Linux 5.6, as are all operations used here
IORING_OFF_SQ_RING: Final = 0
IORING_OFF_SQES: Final = 0x10000000
IORING_ENTER_GETEVENTS: Final = 1 << 0
IORING_REGISTER_EVENTFD: Final = 4
IORING_REGISTER_IOWQ_MAX_WORKERS: Final = 19  # Linux 5.15
IORING_SQ_TASKRUN: Final = 1 << 2

IORING_OP_FSYNC: Final = 3
IORING_OP_FALLOCATE: Final = 17
IORING_OP_READ: Final = 22
IORING_OP_WRITE: Final = 23
IORING_OP_FADVISE: Final = 24
IORING_FSYNC_DATASYNC: Final = 1 << 0

# struct io_uring_params: sq_entries cq_entries flags sq_thread_cpu sq_thread_idle features wq_fd
# resv[3]; sq_off: head tail ring_mask ring_entries flags dropped array resv1 user_addr; cq_off:
# head tail ring_mask ring_entries overflow cqes flags resv1 user_addr.
PARAMS: Final = Struct("=10I8IQ8IQ")
FLAGS, FEATURES, SQ_OFF, CQ_OFF = 2, 5, 10, 19
# struct io_uring_sqe: opcode flags ioprio fd off addr len op_flags user_data; the rest is zero.
SQE: Final = Struct("=BBHiQQIIQ24x")
CQE: Final = Struct("=QiI")  # struct io_uring_cqe: user_data res flags
SQE_SIZE: Final = SQE.size
CQE_SIZE: Final = CQE.size
WRAP: Final = 0xFFFFFFFF  # the rings' indexes are 32-bit counters
# Transfers start before the end of the turn when so many wait, or as many as the device may have:
# it works while we queue the next. Direct I/O at depth 32: 1.1 times the reads, 1.47 the writes.
SUBMIT_AT: Final = 16
TRANSFERS: Final = frozenset({IORING_OP_READ, IORING_OP_WRITE})
# What must wait (fdatasync, cached writes) does so in kernel threads that all rings of a process
# share: four for each CPU by default, so that one hung disk would take them from all others. They
# are made only as they are needed.
WORKERS_MAX: Final = 4 * ENTRIES

_libc = ctypes.CDLL(None, use_errno=True)
_setup = _libc["syscall"]
_setup.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_void_p)
_setup.restype = ctypes.c_long
_enter = _libc["syscall"]  # indexing gives a function object of its own, with its own types
_enter.argtypes = (ctypes.c_long, *[ctypes.c_uint] * 4, ctypes.c_void_p, ctypes.c_size_t)
_enter.restype = ctypes.c_long
_register = _libc["syscall"]
_register.argtypes = (ctypes.c_long, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.c_uint)
_register.restype = ctypes.c_long


class Ring(Engine):
    """An engine on io_uring. Raises OSError where the kernel lacks it or a sandbox refuses it.

    With at most as many operations in flight as the submission queue has entries, none that the
    kernel has not taken yet is overwritten. The completion queue has twice as many: it holds what
    has ended, and all that follows it and ends before the first have been taken out.
    """

    def __init__(self, reactor: Reactor, fd: int, on_room: OnRoom) -> None:
        self.kick_due = False
        self._reactor = reactor
        self._fd = fd
        self._on_room = on_room
        self._queued = 0
        self._tail = self._head = 0  # the queues' indexes, ours to move: a new ring's are 0
        self._ring_fd, params = _set_up(ENTRIES)
        self._event_fd = -1
        self._maps: list[mmap.mmap] = []
        try:
            self._map(params)
            self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            descriptors = array.array("i", [self._event_fd])
            address, count = descriptors.buffer_info()
            _check(
                _register(
                    SYS_IO_URING_REGISTER, self._ring_fd, IORING_REGISTER_EVENTFD, address, count
                )
            )
        except BaseException:
            self._release()
            raise
        self.depth = params[0] - 1
        self.tags = {}
        _allow_workers(self._ring_fd)
        # Edge-triggered, so that nobody has to read it: each completion is a new edge. The ring's
        # own descriptor would not do: with DEFER_TASKRUN it stays silent until we enter.
        reactor.add_fd(
            self._event_fd, self._on_event, name="io_uring", events=select.EPOLLIN | select.EPOLLET
        )

    def read(self, buffer: AlignedBuffer, start: int, length: int, offset: int, tag: Tag) -> None:
        self._queue(IORING_OP_READ, offset, buffer.address + start, length, 0, tag)

    def write(
        self, buffer: AlignedBuffer, start: int, length: int, offset: int, flags: int, tag: Tag
    ) -> None:
        self._queue(IORING_OP_WRITE, offset, buffer.address + start, length, flags, tag)

    def datasync(self, tag: Tag) -> None:
        self._queue(IORING_OP_FSYNC, 0, 0, 0, IORING_FSYNC_DATASYNC, tag)

    def allocate(self, mode: int, offset: int, length: int, tag: Tag) -> None:
        self._queue(IORING_OP_FALLOCATE, offset, length, mode, 0, tag)

    def will_need(self, offset: int, length: int, tag: Tag) -> None:
        self._queue(IORING_OP_FADVISE, offset, 0, length, os.POSIX_FADV_WILLNEED, tag)

    def kick(self) -> None:
        """Submit what is still queued and take what has completed, in one system call."""
        if self._ring_fd < 0:  # closed since it was marked
            return
        if self._queued or self._words[self._sq_flags] & IORING_SQ_TASKRUN:
            done = self._start(IORING_ENTER_GETEVENTS)
            if done < 0 and ctypes.get_errno() not in (errno.EAGAIN, errno.EBUSY, errno.EINTR):
                _check(done)
        try:
            self._reap()
        finally:
            # Either the kernel was short of memory, or it left completions for another round, or
            # what a completion called has failed, and no new event will tell of the others.
            if self._queued or self._has_completed():
                self._reactor.mark_kick(self)

    def close(self) -> None:
        self._reactor.remove_fd(self._event_fd)
        self._release()

    def _queue(
        self, opcode: int, offset: int, address: int, length: int, flags: int, tag: Tag
    ) -> None:
        assert self.in_flight <= self.depth, "the queue is full"
        number = self.number = self.number + 1
        self.tags[number] = tag
        try:
            tail = self._tail
            place = (tail & self._sq_mask) * SQE_SIZE
            SQE.pack_into(
                self._sqes, place, opcode, 0, 0, self._fd, offset, address, length, flags, number
            )
            self._tail = (tail + 1) & WRAP
            self._queued += 1
            self.in_flight += 1
            queued = self._queued
            if (queued * 2 >= self.in_flight or queued >= SUBMIT_AT) and opcode in TRANSFERS:
                self._start(0)  # should it fail, `kick` will say so
            if not self.kick_due:
                self._reactor.mark_kick(self)
        except Exception:  # no memory, which ctypes calls an ArgumentError
            self._reactor.lose()  # it may be queued or not: it might be answered twice, or never
            raise

    def _start(self, flags: int) -> int:
        """Enter the kernel; returns how many operations it took, less than 0 when it failed."""
        self.rounds += 1
        # The kernel reads the tail in this thread, inside the call: no barrier is needed.
        self._words[self._sq_tail] = self._tail
        done: int = _enter(SYS_IO_URING_ENTER, self._ring_fd, self._queued, 0, flags, None, 0)
        if done > 0:
            self._queued -= done
        return done

    def _has_completed(self) -> bool:
        words = self._words
        return words[self._cq_tail] != self._head or words[self._sq_flags] & IORING_SQ_TASKRUN != 0

    def _on_event(self, _events: int) -> bool:
        # Completions that `kick` has taken meanwhile raised the event as well.
        if not self._has_completed():
            return False
        self._reactor.mark_kick(self)
        return True

    def _reap(self) -> None:
        words, rings, cqes, mask = self._words, self._rings, self._cqes, self._cq_mask
        head = self._head
        # CPUs that reorder loads might read an entry before the tail that announces it. Completions
        # are posted inside our system calls, which orders them; those that a plain ring posts
        # meanwhile are safe too, as the interpreter lies between these loads: no CPU looks ahead
        # over so many instructions.
        tail = words[self._cq_tail]
        if head == tail:
            return
        pop, unpack = self.tags.pop, CQE.unpack_from
        try:
            while head != tail:
                number, result, _flags = unpack(rings, cqes + (head & mask) * CQE_SIZE)
                head = (head + 1) & WRAP
                tag = pop(number)
                self.in_flight -= 1
                tag[0](result, tag)
        finally:  # what was called may fail; the others' operations still end once
            self._head = words[self._cq_head] = head
            self._on_room()

    def _map(self, params: tuple[int, ...]) -> None:
        needed = IORING_FEAT_SINGLE_MMAP | IORING_FEAT_RW_CUR_POS
        if params[FEATURES] & needed != needed:
            raise OSError(errno.ENOSYS, "Linux before 5.6")
        entries, cq_entries = params[:2]
        _, sq_tail, sq_mask, _, sq_flags, _, sq_array = params[SQ_OFF : SQ_OFF + 7]
        cq_head, cq_tail, cq_mask, _, _, self._cqes = params[CQ_OFF : CQ_OFF + 6]
        rings_size = max(sq_array + 4 * entries, self._cqes + CQE_SIZE * cq_entries)
        self._rings = mmap.mmap(self._ring_fd, rings_size, offset=IORING_OFF_SQ_RING)
        self._maps.append(self._rings)
        # Stores to a view of 32-bit words are single machine stores, as the kernel expects.
        words = self._words = memoryview(self._rings).cast("I")
        self._sqes = mmap.mmap(self._ring_fd, SQE_SIZE * entries, offset=IORING_OFF_SQES)
        self._maps.append(self._sqes)
        for index in range(entries):  # entry i of the queue always names SQE i
            words[sq_array // 4 + index] = index
        self._sq_tail, self._sq_flags = sq_tail // 4, sq_flags // 4
        self._cq_head, self._cq_tail = cq_head // 4, cq_tail // 4
        self._sq_mask, self._cq_mask = words[sq_mask // 4], words[cq_mask // 4]

    def _release(self) -> None:
        if self._maps:
            self._words.release()
        for mapped in self._maps:
            mapped.close()
        for fd in (self._event_fd, self._ring_fd):
            if fd >= 0:
                os.close(fd)
        self._ring_fd = self._event_fd = -1


def _set_up(entries: int) -> tuple[int, tuple[int, ...]]:
    """Return a new ring's descriptor and its io_uring_params; raises OSError."""
    # DEFER_TASKRUN works completions off when we enter, instead of interrupting whatever we do
    # (12 % more direct reads per second); older kernels answer EINVAL and get the plain ring.
    deferred = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_TASKRUN_FLAG
    params = ctypes.create_string_buffer(PARAMS.size)
    for flags in (IORING_SETUP_CLAMP | deferred, IORING_SETUP_CLAMP):
        fields = [0] * (CQ_OFF + 9)
        fields[FLAGS] = flags
        PARAMS.pack_into(params, 0, *fields)
        fd: int = _setup(SYS_IO_URING_SETUP, entries, params)  # close-on-exec by the kernel
        if fd >= 0 or ctypes.get_errno() != errno.EINVAL:
            break
    _check(fd)
    return fd, PARAMS.unpack_from(params)


def _allow_workers(ring_fd: int) -> None:
    most = array.array("I", [WORKERS_MAX, 0])  # of files and block devices; 0: as it is
    address, count = most.buffer_info()
    _register(SYS_IO_URING_REGISTER, ring_fd, IORING_REGISTER_IOWQ_MAX_WORKERS, address, count)


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

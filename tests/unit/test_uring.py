"""The engines, io_uring and threads, through one set of tests."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backends import uring
from backends.buffers import FREE_BYTES_MAX, POOL_BYTES_MAX, AlignedBuffer, BufferPool
from backends.engine import Engine
from backends.linux import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from backends.threads import Threads
from backends.uring import SUBMIT_AT, Ring
from reactor.loop import Reactor
from tests.submitting import turn_until

MIB = 1 << 20
IORING_SQ_CQ_OVERFLOW = 1 << 1


class Bench:
    """An engine on a file of 1 MiB, with what it finished."""

    def __init__(self, make: type[Ring] | type[Threads], path: Path) -> None:
        self.content = os.urandom(MIB)
        path.write_bytes(self.content)
        self.path = path
        self.fd = os.open(path, os.O_RDWR)
        self.reactor = Reactor("interrupt")
        self.results: list[tuple[Any, int]] = []
        self.pool = BufferPool(lambda: None)
        self.rooms: list[int] = []
        self.engine: Engine = make(self.reactor, self.fd, self.note_room)

    def buffer(self, length: int) -> AlignedBuffer:
        buffer = self.pool.take(length)
        assert buffer is not None
        return buffer

    def wait(self) -> None:
        turn_until(self.reactor, lambda: not self.engine.in_flight)

    def note_room(self) -> None:
        self.rooms.append(self.engine.in_flight)

    def note(self, result: int, tag: tuple[Any, ...]) -> None:
        self.results.append((tag[1], result))

    def read(self, buffer: AlignedBuffer, offset: int, name: object = None) -> None:
        self.engine.read(buffer, 0, 4096, offset, (self.note, name, buffer))

    def result(self, start: Callable[..., None], *arguments: Any) -> int:
        start(*arguments, (self.note, "name"))
        self.wait()
        ((name, result),) = self.results
        assert name == "name"
        self.results.clear()
        return result

    def close(self) -> None:
        self.engine.close()
        self.reactor.close()
        os.close(self.fd)


@pytest.fixture
def ring(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(Ring, tmp_path / "file")
    yield bench
    bench.close()


@pytest.fixture
def threads(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(Threads, tmp_path / "file")
    yield bench
    bench.close()


@pytest.fixture(params=[Ring, Threads])
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(request.param, tmp_path / "file")
    yield bench
    bench.close()


def test_reads_into_the_middle_of_a_buffer(bench: Bench) -> None:
    buffer = bench.buffer(4096)
    assert bench.result(bench.engine.read, buffer, 512, 1024, 2048) == 1024
    assert buffer.view[512:1536] == bench.content[2048:3072]
    assert buffer.view[:512] == bytes(512)
    assert buffer.view[1536:4096] == bytes(2560)


def test_writes_from_the_middle_of_a_buffer(bench: Bench) -> None:
    buffer = bench.buffer(4096)
    buffer.view[:] = b"x" * 4096
    buffer.view[512:1536] = b"y" * 1024
    assert bench.result(bench.engine.write, buffer, 512, 1024, 2048, os.RWF_DSYNC) == 1024
    expected = bench.content[:2048] + b"y" * 1024 + bench.content[3072:]
    assert bench.path.read_bytes() == expected


def test_reads_beyond_the_end_are_short(bench: Bench) -> None:
    assert bench.result(bench.engine.read, bench.buffer(4096), 0, 4096, MIB - 512) == 512
    assert bench.result(bench.engine.read, bench.buffer(4096), 0, 4096, MIB) == 0


def test_syncs(bench: Bench) -> None:
    assert bench.result(bench.engine.datasync) == 0


def test_punches_holes(bench: Bench) -> None:
    mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
    assert bench.result(bench.engine.allocate, mode, 4096, 8192) == 0
    expected = bench.content[:4096] + bytes(8192) + bench.content[12288:]
    assert bench.path.read_bytes() == expected


def test_advises(bench: Bench) -> None:
    assert bench.result(bench.engine.will_need, 0, MIB) == 0


def test_failures_are_negative_errnos(bench: Bench) -> None:
    unknown_mode = 1 << 30
    assert bench.result(bench.engine.allocate, unknown_mode, 0, 4096) == -errno.EOPNOTSUPP
    fd = os.open(bench.path, os.O_RDONLY)
    os.dup2(fd, bench.fd)
    os.close(fd)
    assert bench.result(bench.engine.write, bench.buffer(512), 0, 512, 0, 0) == -errno.EBADF


def test_every_operation_of_a_full_engine_ends_once(bench: Bench) -> None:
    depth = bench.engine.depth
    buffers = [bench.buffer(4096) for _ in range(depth)]
    for _ in range(5):  # more often than the queues have entries
        for index, buffer in enumerate(buffers):
            bench.read(buffer, index * 4096 % MIB, index)
        bench.wait()
        assert sorted(bench.results) == [(index, 4096) for index in range(depth)]
        bench.results.clear()
    for index, buffer in enumerate(buffers):
        assert buffer.view == bench.content[index * 4096 % MIB :][:4096]


def fill(bench: Bench) -> None:
    """Begin as many operations as an engine admits, of a kind that waits for the turn's end."""
    for index in range(bench.engine.depth):
        bench.engine.will_need(0, 4096, (bench.note, index))


def fail(*_: object) -> None:
    raise ValueError


def test_a_full_engine_has_a_place_for_a_sync(bench: Bench) -> None:
    fill(bench)
    bench.engine.datasync((bench.note, bench.engine.depth))
    bench.wait()
    assert sorted(bench.results) == [(index, 0) for index in range(bench.engine.depth + 1)]


def test_a_ring_refuses_one_too_many_before_it_overwrites_another(ring: Bench) -> None:
    fill(ring)
    ring.engine.datasync((ring.note, ring.engine.depth))
    with pytest.raises(AssertionError, match="the queue is full"):
        ring.engine.datasync((ring.note, "one too many"))
    ring.wait()
    assert sorted(ring.results) == [(index, 0) for index in range(ring.engine.depth + 1)]


def test_a_full_ring_has_room_for_all_that_ends_and_all_that_follows_it(ring: Bench) -> None:
    """They end before the loop looks, and what follows them before the first is taken out."""
    engine = ring.engine
    assert isinstance(engine, Ring)
    buffers = [ring.buffer(4096) for _ in range(engine.depth + 1)]
    overflows = []

    def follow(_result: int, tag: tuple[Any, ...]) -> None:
        ring.read(buffers[tag[1]], 0, tag[1])
        overflows.append(engine._words[engine._sq_flags] & IORING_SQ_CQ_OVERFLOW)

    engine.datasync((follow, engine.depth))
    for index, buffer in enumerate(buffers[:-1]):
        engine.read(buffer, 0, 4096, 0, (follow, index))
    time.sleep(0.1)  # the sync is to end too
    ring.wait()
    assert sorted(ring.results) == [(index, 4096) for index in range(len(buffers))]
    assert not any(overflows)


def test_a_failure_in_a_completion_does_not_keep_the_others_waiting(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    for index in range(3):
        bench.read(bench.buffer(4096), 0, index)
        bench.engine.read(bench.buffer(4096), 0, 4096, 0, (fail,))
    bench.wait()
    assert sorted(bench.results) == [(index, 4096) for index in range(3)]
    assert len(caplog.records) == 3


def test_room_is_told_after_a_completion_that_failed(bench: Bench) -> None:
    bench.engine.datasync((fail,))
    bench.wait()
    assert bench.rooms == [0]


def test_threads_start_together_what_a_turn_queues(threads: Bench) -> None:
    for count in range(32):
        threads.read(threads.buffer(4096), 4096 * count)
    assert threads.engine.rounds == 0
    threads.reactor.turn()
    assert threads.engine.rounds == 1
    threads.wait()
    assert len(threads.results) == 32


def test_a_ring_starts_some_while_others_are_still_queued(ring: Bench) -> None:
    starts, rounds = [], 0
    for count in range(1, 4 * SUBMIT_AT + 1):
        ring.read(ring.buffer(4096), 4096 * count)
        if ring.engine.rounds > rounds:
            rounds += 1
            starts.append(count)
    assert ring.engine.rounds == rounds
    assert starts == [1, 2, 4, 8, 16, 32, 48, 64]
    assert not ring.results  # they may have ended, but are reported by the loop
    ring.wait()
    assert [result for _, result in ring.results] == [4096] * 4 * SUBMIT_AT


def test_a_sync_waits_for_others_to_share_it(ring: Bench) -> None:
    ring.engine.datasync((ring.note, "sync"))
    assert ring.engine.rounds == 0
    ring.reactor.turn()
    assert ring.engine.rounds > 0
    ring.wait()
    assert ring.results == [("sync", 0)]


def test_a_ring_that_has_it_all_in_memory_takes_it_without_a_system_call(ring: Bench) -> None:
    for count in range(4):
        ring.read(ring.buffer(4096), 4096 * count)  # from the page cache: done when it starts
    before = ring.engine.rounds
    ring.reactor.turn()
    assert len(ring.results) == 4
    assert ring.engine.rounds == before


def test_a_start_that_the_kernel_has_no_memory_for_is_tried_again(
    ring: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = uring._enter, []

    def enter(*arguments: object) -> int:
        if len(failed) < 3:
            failed.append(arguments)
            ctypes.set_errno(errno.EAGAIN)
            return -1
        return real(*arguments)

    monkeypatch.setattr(uring, "_enter", enter)
    for count in range(SUBMIT_AT + 1):
        ring.read(ring.buffer(4096), 4096 * count)
    ring.wait()
    assert [result for _, result in ring.results] == [4096] * (SUBMIT_AT + 1)


def test_what_the_kernel_takes_only_a_part_of_starts_later(
    ring: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter = uring._enter

    def one(number: int, fd: int, queued: int, *others: Any) -> int:
        return int(enter(number, fd, min(queued, 1), *others))

    monkeypatch.setattr(uring, "_enter", one)
    for offset in range(8):
        ring.read(ring.buffer(4096), offset * 4096, offset)
    ring.wait()
    assert sorted(ring.results) == [(offset, 4096) for offset in range(8)]


def test_starts_more_from_inside_a_completion(bench: Bench) -> None:
    left = 1000
    buffer = bench.buffer(4096)

    def again(*_: object) -> None:
        nonlocal left
        left -= 1
        if left:
            bench.engine.read(buffer, 0, 4096, left * 512, (again,))

    bench.engine.read(buffer, 0, 4096, 0, (again,))
    turn_until(bench.reactor, lambda: not left)


def test_room_is_told_after_operations_have_ended(bench: Bench) -> None:
    bench.read(bench.buffer(4096), 0)
    assert not bench.rooms
    bench.wait()
    assert bench.rooms == [0]  # in flight at that time


def test_an_idle_engine_lets_the_loop_sleep(bench: Bench) -> None:
    bench.result(bench.engine.read, bench.buffer(4096), 0, 4096, 0)
    woken: list[bool] = []
    bench.reactor.call_later(0.1, lambda: woken.append(True))
    before = bench.reactor.turns
    turn_until(bench.reactor, lambda: woken)
    assert bench.reactor.turns <= before + 3


def test_direct_reads_take_pooled_buffers(bench: Bench) -> None:
    flags = os.O_RDWR | os.O_DIRECT
    fd = os.open(bench.path, flags)
    os.dup2(fd, bench.fd)
    os.close(fd)
    buffer = bench.buffer(MIB)
    assert bench.result(bench.engine.read, buffer, 0, MIB, 0) == MIB
    assert buffer.view == bench.content


def test_closing_after_a_mark_is_harmless(bench: Bench) -> None:
    bench.reactor.mark_kick(bench.engine)  # type: ignore[arg-type]
    bench.engine.close()
    bench.reactor.turn()
    bench.engine.close = lambda: None  # type: ignore[method-assign]


def test_a_ring_without_descriptors_fails_and_leaves_none(tmp_path: Path) -> None:
    reactor = Reactor()
    highest = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 10, hard))
        held += _all_descriptors()
        for _ in range(4):  # a ring needs four: at each shortage it must clean up
            with pytest.raises(OSError, match="Too many open files"):
                Ring(reactor, 0, lambda: None)
            os.close(held.pop())
        Ring(reactor, 0, lambda: None).close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
        reactor.close()


def _all_descriptors() -> Iterator[int]:
    while True:
        try:
            yield os.dup(0)
        except OSError:
            return


SANDBOXED = """
import ctypes, errno, struct, sys
from backends.registry import backend
from reactor import log
from reactor.loop import Reactor
from tests.submitting import Requester

# A seccomp filter as container runtimes have it: io_uring_setup (425) answers EPERM.
program = b"".join(struct.pack("=HBBI", *instruction) for instruction in (
    (0x20, 0, 0, 0),  # load the number of the system call
    (0x15, 0, 1, 425),
    (0x06, 0, 0, 0x00050000 | errno.EPERM),
    (0x06, 0, 0, 0x7FFF0000),
))
code = ctypes.create_string_buffer(program)
fprog = struct.pack("HxxxxxxP", 4, ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
assert libc.prctl(22, 2, fprog, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER

log.set_up("test", "text", "info")
for name in ("a", "b"):
    reactor = Reactor()
    disk = backend("file").create(
        name, {"path": f"{sys.argv[1]}/{name}", "size": 1 << 20, "direct": True},
        instance="test", reactor=reactor, block_size=None, readonly=False,
        shared=False)
    channel = disk.channel(reactor)
    requester = Requester(reactor, channel)
    requester.write(4096, b"data" * 1024)
    assert requester.do(3) == (0, b"")
    assert requester.read(4096, 4096) == b"data" * 1024
    channel.close()
    disk.close()
    reactor.close()
print("served")
"""


def test_where_io_uring_is_forbidden_threads_serve_after_one_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SANDBOXED, str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "served\n", done.stderr
    warning = "no io_uring (Operation not permitted): slower threads do the I/O of files"
    assert [line for line in done.stderr.splitlines() if line.endswith(warning)]
    assert len(done.stderr.splitlines()) == 1


def test_buffers_are_aligned_and_large_enough() -> None:
    pool = BufferPool(lambda: None)
    for length in (1, 512, 4096, 4097, 65536, 32 * MIB):
        buffer = pool.take(length)
        assert buffer is not None
        assert buffer.address % 4096 == 0
        assert len(buffer.view) >= length
        buffer.release()


def test_the_pool_has_a_bound_and_says_when_it_has_room_again() -> None:
    told: list[bool] = []
    pool = BufferPool(lambda: told.append(True))
    taken = []
    while buffer := pool.take(32 * MIB):
        taken.append(buffer)
    assert len(taken) == POOL_BYTES_MAX // (32 * MIB)
    assert pool.take(1) is None
    taken.pop().release()
    assert told == [True]
    assert pool.take(1) is not None
    taken.pop().release()
    assert told == [True]  # nobody was refused since


def test_free_buffers_do_not_keep_others_from_being_made() -> None:
    pool = BufferPool(lambda: None)
    small = [pool.take(4096) for _ in range(2 * FREE_BYTES_MAX // 4096)]
    for buffer in small:
        assert buffer is not None
        buffer.release()
    assert pool.total_bytes == pool.free_bytes == FREE_BYTES_MAX
    large = [pool.take(32 * MIB) for _ in range(POOL_BYTES_MAX // (32 * MIB))]
    assert None not in large
    assert pool.free_bytes == 0
    assert pool.total_bytes == POOL_BYTES_MAX


def test_a_lent_view_outlives_its_pool() -> None:
    pool = BufferPool(lambda: None)
    buffer = pool.take(4096)
    assert buffer is not None
    buffer.view[:4] = b"data"
    view = buffer.view[:4]
    del pool, buffer
    assert bytes(view) == b"data"


class Holding:
    """A holder that gives back when it is asked."""

    def __init__(self, buffer: AlignedBuffer | None) -> None:
        assert buffer is not None
        self.buffer = buffer
        self.asked = 0

    def give_back(self) -> None:
        self.asked += 1
        self.buffer.release()


def test_blocked_holders_are_asked_only_when_the_pool_is_empty_and_then_at_once() -> None:
    told: list[bool] = []
    pool = BufferPool(lambda: told.append(True))
    first, second = Holding(pool.take(32 * MIB)), Holding(pool.take(32 * MIB))
    first.buffer.blocked(first)
    assert first.asked == 0
    third = pool.take(32 * MIB)
    assert third is not None
    assert first.asked == 1
    assert pool.take(1) is None  # nobody else is known to be blocked
    assert not told
    second.buffer.blocked(second)
    assert (first.asked, second.asked) == (1, 1)
    assert told == [True]
    third.release()

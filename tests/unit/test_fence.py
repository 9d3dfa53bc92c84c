"""The fence: what the kernel has sent twice is begun only when the first copy has ended."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.malloc import BACKEND, MallocDisk
from reactor.data.fence import STRANGE, FencedConnection
from reactor.loop import READABLE, Reactor
from tests.unit.fencing import LANE, OTHER, Bed, handle, shut, write
from tests.unit.pumping import Pump
from tests.unit.requests import replies, request

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    made = Bed(tmp_path / "data")
    with made.stack:
        yield made


def test_a_copy_waits_until_the_first_has_ended(bed: Bed) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    shut(first)
    second.send(write(LANE, sent=2))
    bed.a_while()
    assert not held.submitted, "the first is still under way"
    assert not first.closed
    slow.finish()
    bed.until(lambda: held.submitted)
    held.finish()
    bed.until(lambda: first.closed)
    assert len(slow.submitted) == 1


def test_the_other_lanes_do_not_wait(bed: Bed) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    second.send(write(OTHER))
    bed.until(lambda: held.submitted)


@pytest.mark.parametrize("command", [TRIM, ZEROES])
def test_whatever_changes_the_disk_waits_and_what_does_not_does_not(bed: Bed, command: int) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(request(command, 0, 512, cookie=handle(LANE)))
    bed.until(lambda: slow.pending)
    reading = request(READ, 0, 512, cookie=handle(LANE, 2))
    second.send(reading + request(FLUSH, cookie=handle(LANE, 3)))
    bed.until(lambda: len(held.submitted) == 2)
    second.send(request(command, 0, 512, cookie=handle(LANE, sent=2)))
    bed.a_while()
    assert len(held.submitted) == 2
    slow.finish()
    bed.until(lambda: len(held.submitted) == 3)


def test_what_waits_behind_it_comes_in_order(bed: Bed) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    shut(first)
    ours = [write(OTHER, tag) for tag in range(4)]
    second.send(ours[0] + write(LANE, sent=2) + b"".join(ours[1:]))
    bed.until(lambda: held.submitted)
    bed.a_while()
    assert [offset for _, offset, _, _ in held.submitted] == [0]
    slow.finish()
    bed.until(lambda: len(held.submitted) == 5)
    assert [offset // 512 for _, offset, _, _ in held.submitted] == [0, 1, 1, 2, 3]
    assert [payload[0] for *_, payload in held.submitted if payload] == [1, 2, 1, 1, 1]


def test_what_waits_for_room_and_then_for_a_lane_comes_in_order(bed: Bed) -> None:
    first, slow = bed.worker()
    second, held = bed.worker(room=1)
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    second.send(write(OTHER, 1) + write(OTHER, 2) + write(LANE, 3) + write(OTHER, 4))
    for count in (1, 2):
        bed.until(lambda count=count: len(held.submitted) == count)
        held.finish_all()
    bed.a_while()
    assert len(held.submitted) == 2
    slow.finish()
    for count in (3, 4):
        bed.until(lambda count=count: len(held.submitted) == count)
        held.finish_all()
    assert [offset // 512 for _, offset, _, _ in held.submitted] == [1, 2, 3, 4]


def test_what_a_stopped_worker_had_not_begun_is_not_begun_later(bed: Bed) -> None:
    """It knows of something to receive, and not yet of the end."""
    stopped, late = bed.worker()
    second, held = bed.worker()
    stopped.client.send(write(LANE))
    shut(stopped)
    second.send(write(LANE, sent=2))
    second.until(lambda: held.submitted)
    stopped.connection._on_ready(READABLE)
    held.finish()
    bed.until(lambda: stopped.closed)
    bed.a_while()
    stopped.connection.resume()
    assert not late.submitted


def test_what_waits_for_room_is_not_begun_after_the_copy(bed: Bed) -> None:
    first, slow = bed.worker(room=1)
    second, held = bed.worker()
    assert isinstance(first.connection, FencedConnection)
    first.send(write(LANE, 1) + write(LANE, 2))
    bed.until(lambda: slow.pending)
    shut(first)
    second.send(write(LANE, 2, sent=2))
    second.turns()
    slow.finish()
    first.connection._look_at_lanes()
    slow.room()
    assert len(slow.submitted) == 1, "it has the lane, but the kernel has sent this elsewhere"
    bed.until(lambda: held.submitted)
    bed.until(lambda: first.closed)
    assert len(slow.submitted) == 1


def test_who_is_busy_gives_the_lane_up_when_it_is_wished_for(bed: Bed) -> None:
    """The kernel sends to the connection that came back; older copies wait on another."""
    busy, slow = bed.worker()
    second, held = bed.worker()
    busy.send(write(LANE, 1))
    bed.until(lambda: slow.pending)
    second.send(write(LANE, 2))
    bed.a_while()
    busy.send(write(LANE, 3))
    bed.a_while()
    assert not held.submitted
    assert len(slow.submitted) == 1, "it begins nothing that would keep the lane"
    slow.finish()
    bed.until(lambda: held.submitted)
    bed.a_while()
    assert len(slow.submitted) == 1
    held.finish()
    bed.until(lambda: len(slow.submitted) == 2)


def test_two_who_want_the_lane_of_the_other_get_it(bed: Bed) -> None:
    one, ones = bed.worker()
    two, twos = bed.worker()
    one.send(write(LANE))
    two.send(write(OTHER))
    bed.until(lambda: ones.pending and twos.pending)
    one.send(write(OTHER, 2))
    two.send(write(LANE, 2))
    bed.a_while()
    ones.finish()
    twos.finish()
    bed.until(lambda: len(ones.submitted) + len(twos.submitted) == 4)


def test_a_worker_waits_for_what_its_own_closed_connection_has_in_flight(bed: Bed) -> None:
    lanes = bed.open()
    first, slow = bed.connection(lanes)
    second, held = bed.connection(lanes)
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    shut(first)
    second.send(write(LANE, sent=2))
    bed.a_while()
    assert not held.submitted
    slow.finish()
    bed.until(lambda: held.submitted)


def test_the_lane_of_who_is_idle_is_free_and_so_is_all_when_it_has_closed(bed: Bed) -> None:
    first, slow = bed.worker()
    other = bed.open()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    for _ in range(2):
        assert not other._locks.take(LANE)
        slow.finish()
        bed.until(lambda: other._locks.take(LANE))
        other._locks.give_up(LANE)
        first.send(write(LANE))
        bed.until(lambda: slow.pending)
    first.connection.close("the test wants it")
    bed.a_while()
    assert not other._locks.take(LANE), "its last request is still in flight"
    slow.finish()
    bed.until(lambda: other._locks.take(LANE))


def test_a_wish_ends_with_its_connection(bed: Bed) -> None:
    first, slow = bed.worker()
    second, _ = bed.worker()
    third = bed.open()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    second.send(write(LANE, sent=2))
    bed.until(lambda: third.is_wished(LANE))
    second.client.close()
    bed.until(lambda: second.closed)
    assert not third.is_wished(LANE)


def test_who_refuses_everything_does_not_wait(bed: Bed) -> None:
    first, slow = bed.worker()
    second, held = bed.worker()
    third = bed.open()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    second.send(write(LANE, sent=2))
    bed.until(lambda: third.is_wished(LANE))
    second.connection.refuse()
    bed.turn()
    [(cookie, error, _)] = replies(second.receive(16), {})
    assert (cookie, error) == (handle(LANE, sent=2), 108)
    assert not held.submitted
    assert not third.is_wished(LANE)


def test_a_disconnect_has_no_lane(bed: Bed) -> None:
    first, slow = bed.worker()
    second, _ = bed.worker()
    first.send(write(LANE))
    bed.until(lambda: slow.pending)
    second.send(request(DISC, cookie=0))
    bed.until(lambda: second.closed)
    assert second.closed == ["the client disconnected"]


def test_a_lock_outlives_its_worker_while_the_open_file_lives(tmp_path: Path, bed: Bed) -> None:
    """As when io_uring has the dead worker's write: it holds the open file."""
    path = tmp_path / "data"
    worker = os.open(path, os.O_RDWR | os.O_CREAT)
    in_flight = os.dup(worker)
    other = os.open(path, os.O_RDWR)
    try:
        assert bed.locks(worker).take(LANE)
        os.close(worker)
        assert not bed.locks(other).take(LANE)
        os.close(in_flight)
        assert bed.locks(other).take(LANE)
    finally:
        os.close(other)


def test_without_a_file_or_locks_on_it_the_lanes_are_those_of_one_worker(
    tmp_path: Path, bed: Bed, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "data").touch()
    fd = os.open(tmp_path / "data", os.O_PATH)
    try:
        for locks in (bed.locks(None), bed.locks(fd)):
            assert locks.take(LANE)
            locks.wish(LANE)
            assert not locks.is_wished(LANE)
            locks.wish_no_more(LANE)
            locks.give_up(LANE)
    finally:
        os.close(fd)
    assert caplog.text.count("a request that is sent twice may be done twice") == 1


# --- handles ---


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("seed", range(8))
def test_the_order_of_a_handle_is_seen(bed: Bed, order: str, seed: int) -> None:
    chance = random.Random(seed)
    lanes = bed.lanes(None)
    sent = chance.randrange(1, 255)  # others can be read both ways
    for _ in range(1000):
        lane, tag = chance.randrange(16), chance.randrange(128)
        assert lanes.lane_of(handle(lane, tag, sent, order)) == lane
        sent = chance.randrange(1 << 32)


@pytest.mark.parametrize(("release", "lane"), [("6.1.0-9-amd64", 2), ("6.4.0", 5), ("7.0", 5)])
def test_of_a_handle_that_can_be_read_both_ways_the_kernels_release_tells(
    monkeypatch: pytest.MonkeyPatch, bed: Bed, release: str, lane: int
) -> None:
    monkeypatch.setattr("platform.release", lambda: release)
    both = int.from_bytes(bytes([7, 0, 2, 0, 0, 5, 0, 7]), "big")
    lanes = bed.lanes(None)
    assert lanes.lane_of(both) == lane
    assert lanes.network_order is None, "nothing is certain yet"


def test_strange_handles_have_one_lane(bed: Bed) -> None:
    strange = (1 << 64) - 1
    assert bed.lanes(None).lane_of(strange) == STRANGE
    first, slow = bed.worker()
    second, held = bed.worker()
    first.send(request(WRITE, cookie=strange, payload=bytes(512)))
    bed.until(lambda: slow.pending)
    second.send(request(WRITE, cookie=strange - 1, payload=bytes(512)))
    bed.a_while()
    assert not held.submitted
    slow.finish()
    bed.until(lambda: held.submitted)


# --- memory ---


@pytest.fixture
def memory() -> Iterator[MallocDisk]:
    reactor, instance = Reactor("poll"), f"fence-{os.getpid()}"
    made = BACKEND.create(
        *("disk", {"size": 1 << 22}),
        instance=instance,
        reactor=reactor,
        block_size=512,
        readonly=False,
        shared=True,
    )
    assert isinstance(made, MallocDisk)
    made.memory.back(0, made.size)
    yield made
    made.close()
    reactor.close()
    BACKEND.discard("disk", instance)


def test_plain_writes_to_memory_wait_too(memory: MallocDisk, bed: Bed) -> None:
    pump = bed.stack.enter_context(Pump(disk=memory, lanes=bed.lanes(memory.lock_fd)))
    others = bed.lanes(os.open(f"/proc/self/fd/{memory.lock_fd}", os.O_RDWR))
    fd = others._locks._fd
    assert fd is not None
    try:
        assert others._locks.take(LANE)
        pump.send(write(OTHER, 1) + write(OTHER, 2) + write(LANE, 3) + write(OTHER, 4))
        pump.until(lambda: others.is_wished(LANE))
        assert bytes(memory.memory.data[512 : 5 * 512 : 512]) == b"\1\1\0\0"
        assert len(pump.receive(2 * 16)) == 2 * 16
        others._locks.give_up(LANE)
        pump.receive(2 * 16)
        assert bytes(memory.memory.data[512 : 5 * 512 : 512]) == b"\1\1\1\1"
        pump.send(write(OTHER, 5) + request(READ, 512, 512, cookie=handle(OTHER)))
        answered = replies(pump.receive(2 * 16 + 512), {handle(OTHER): 512})
        assert {data for *_, data in answered} == {b"", b"\1" * 512}
    finally:
        os.close(fd)


def test_a_large_write_on_its_way_into_memory_ends_before_the_lane_is_given_up(
    memory: MallocDisk, bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reactor.data.fence.LOOK_SECONDS", 3600)
    pump = bed.stack.enter_context(Pump(disk=memory, lanes=bed.lanes(memory.lock_fd)))
    connection = pump.connection
    assert isinstance(connection, FencedConnection)
    fd = os.open(f"/proc/self/fd/{memory.lock_fd}", os.O_RDWR)
    try:
        other = bed.locks(fd)
        pump.send(write(LANE))  # from now on it has the lane, and plain requests go the short way
        pump.receive(16)
        large = request(WRITE, 0, cookie=handle(LANE), payload=b"\7" * (1 << 20))
        pump.send(large[: 1 << 19])
        pump.until(lambda: connection._shortcut and connection._shortcut.placing)
        other.wish(LANE)
        connection._look_at_lanes()
        assert not other.take(LANE)
        pump.send(large[1 << 19 :] + write(LANE))
        assert replies(pump.receive(16), {}) == [(handle(LANE), 0, b"")]
        assert bytes(memory.memory.data[: 1 << 20]) == b"\7" * (1 << 20)
        connection._look_at_lanes()
        assert other.take(LANE)
        pump.turns()
        assert not pump.drain_client(), "the next waits until who wished for the lane is done"
        other.give_up(LANE)
        pump.receive(16)
    finally:
        os.close(fd)

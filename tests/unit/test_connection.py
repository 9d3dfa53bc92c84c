"""One connection on a real socket pair: order, bounds, errors, and every way it ends."""

from __future__ import annotations

import errno

import pytest

from backends.api import DONE, Buffer, Request
from reactor.data.clientmemory import CLIENT_BYTES_MAX
from reactor.data.connection import FAILURES_LOGGED, QUEUE_MAX
from reactor.loop import READABLE, WRITABLE
from reactor.protocol.wire import MAX_PAYLOAD
from tests.unit.pumping import CallChannel, HeldChannel, Lent, Pump, null_disk, pattern
from tests.unit.requests import EVERYTHING, READ_ONLY, export, replies, reply, request

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)
FUA = 1


def raising(error: Exception) -> CallChannel:
    def fail(_request: Request) -> Buffer | None:
        raise error

    return CallChannel(null_disk(), fail)


def test_requests_are_answered_in_one_receive_and_one_send() -> None:
    with Pump() as pump:
        stream = b"".join(
            [
                request(READ, 0, 512, cookie=1),
                request(WRITE, 512, cookie=2, payload=bytes(512)),
                request(FLUSH, cookie=3),
                request(TRIM, 0, 512, cookie=4),
                request(CACHE, 0, 512, cookie=5),
                request(ZEROES, 0, 512, cookie=6),
            ]
        )
        answer = pump.ask(stream, _1=512)
        assert answer == [(1, 0, bytes(512))] + [(cookie, 0, b"") for cookie in range(2, 7)]
        counters = pump.connection.counters
        assert (counters.receives, counters.sends) == (1, 1)
        assert (counters.reads, counters.read_bytes) == (1, 512)
        assert (counters.writes, counters.written_bytes) == (1, 512)
        assert (
            counters.flushes,
            counters.zeroes,
            counters.errors,
        ) == (1, 1, 0)
        assert (counters.trims, counters.trimmed_bytes) == (1, 512)


@pytest.mark.parametrize("command", [READ, WRITE])
def test_at_depth_32_there_are_two_system_calls_for_32_requests(command: int) -> None:
    with Pump() as pump:
        payload = bytes(4096) if command == WRITE else b""
        stream = b"".join(request(command, 0, 4096, cookie=i, payload=payload) for i in range(32))
        for _ in range(50):
            if command == READ:  # a write of 132 KiB is received in as many pieces as it came
                assert pump.client.send(stream) == len(stream)
            else:
                pump.send(stream)
            pump.receive(32 * (16 + (4096 if command == READ else 0)))
        counters = pump.connection.counters
        assert counters.reads + counters.writes == 32 * 50
        pieces = 1 if command == READ else 4
        assert counters.receives <= 50 * pieces
        assert counters.sends <= 50 * pieces


def test_a_thousand_replies_leave_in_gathered_sends() -> None:
    with Pump() as pump:
        stream = b"".join(request(READ, 0, 512, cookie=i) for i in range(1000))
        pump.send(stream)
        received = pump.receive(1000 * (16 + 512))
        found = replies(received, dict.fromkeys(range(1000), 512))
        assert [cookie for cookie, _, _ in found] == list(range(1000))
        assert pump.connection.counters.sends <= 10


def test_a_short_send_keeps_its_place_and_arms_epollout_until_all_has_left() -> None:
    with Pump(send_buffer=4096) as pump:
        pump.send(request(READ, 0, 1 << 20, cookie=1))
        pump.turns()
        assert pump.connection._events & WRITABLE
        pump.turns(20)
        assert pump.connection.counters.sends == 1, "it tried again without being told to"
        assert pump.receive(16 + (1 << 20)) == reply(1, data=bytes(1 << 20))
        pump.turns()
        assert pump.connection._events == READABLE


def test_epollout_is_never_armed_while_sends_are_whole() -> None:
    with Pump() as pump:
        modified: list[int] = []
        modify = pump.reactor.modify_fd
        pump.reactor.modify_fd = lambda fd, events: (modified.append(events), modify(fd, events))[1]  # type: ignore[method-assign]
        for _ in range(20):
            pump.ask(request(READ, 0, 4096), _1=4096)
        assert not modified


@pytest.mark.parametrize("size", [2048, 5000, 20_000])
def test_whatever_the_socket_takes_the_stream_is_the_same(size: int) -> None:
    disk = null_disk(8 << 20)
    channel = CallChannel(disk, lambda r: pattern(r[3], r[4]) if r[0] == READ else DONE)
    with Pump(channel, export=export(size=8 << 20), send_buffer=size) as pump:
        lengths = {i: 512 * (1 + i % 40) for i in range(200)}
        stream = b"".join(request(READ, 512 * i, length, cookie=i) for i, length in lengths.items())
        pump.send(stream)
        expected = b"".join(
            reply(i, data=pattern(512 * i, length)) for i, length in lengths.items()
        )
        assert pump.receive(len(expected)) == expected


# --- refusals ---


@pytest.mark.parametrize(
    ("bad", "expected"),
    [
        (request(42, 0, 512), 22),
        (request(READ, 1 << 20, 512), 22),
        (request(READ, 0, 100), 22),
        (request(READ, 0, 512, flags=1 << 14), 22),
        (request(WRITE, 1 << 20, payload=bytes(512)), 28),
        (request(WRITE, 0, payload=bytes(100)), 22),
        (request(WRITE, (1 << 64) - 512, payload=bytes(1024)), 28),
        (request(TRIM, 1 << 20, 512), 22),
        (request(ZEROES, 1 << 20, 512), 28),
        (request(FLUSH, 512, 0), 22),
        (request(READ, 0, 0xFFFFFFFF - 511), 22),
    ],
)
def test_a_bad_request_gets_its_error_and_the_connection_lives(bad: bytes, expected: int) -> None:
    with Pump() as pump:
        answer = pump.ask(bad + request(READ, 0, 512, cookie=2), _2=512)
        assert answer == [(1, expected, b""), (2, 0, bytes(512))]
        assert pump.connection.counters.errors == 1
        assert not pump.closed


def test_a_write_to_a_read_only_export_is_consumed_and_refused() -> None:
    held = HeldChannel(null_disk())
    with Pump(held, export=export(size=64 << 20, flags=EVERYTHING | READ_ONLY)) as pump:
        pump.send(request(WRITE, payload=bytes(512), cookie=1))
        pump.send(request(WRITE, payload=bytes(MAX_PAYLOAD), cookie=2))
        pump.send(request(TRIM, 0, 512, cookie=3))
        assert pump.receive(48) == reply(1, 1) + reply(2, 1) + reply(3, 1)
        assert not held.submitted


def test_a_read_of_4_gib_is_refused_without_memory_for_it() -> None:
    with Pump(export=export(size=1 << 40), disk=null_disk(1 << 40)) as pump:
        assert pump.ask(request(READ, 0, 0xFFFFFE00)) == [(1, errno.EOVERFLOW, b"")]


@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, ZEROES])
def test_a_request_of_length_0_succeeds_without_the_backend(command: int) -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        assert pump.ask(request(command, 0, 0)) == [(1, 0, b"")]
        assert not held.submitted


def test_a_write_with_fua_reaches_the_backend_with_its_flag() -> None:
    flags: list[int] = []

    def note(request: Request) -> Buffer | None:
        flags.append(request[1])
        return DONE

    with Pump(CallChannel(null_disk(), note)) as pump:
        assert pump.ask(request(WRITE, payload=bytes(512), flags=FUA)) == [(1, 0, b"")]
    assert flags == [FUA]


# --- failures of the backend ---


@pytest.mark.parametrize(
    ("number", "expected"),
    [(errno.ENOSPC, 28), (errno.EIO, 5), (errno.EDQUOT, 28), (errno.EROFS, 1), (errno.EBADF, 5)],
)
def test_a_failure_of_the_backend_is_answered_with_its_errno(number: int, expected: int) -> None:
    with Pump(raising(OSError(number, "no"))) as pump:
        for _ in range(2):
            answer = pump.ask(request(WRITE, payload=bytes(512)))
            assert answer == [(1, expected, b"")]
        assert pump.connection.counters.errors == 2
        assert pump.connection.counters.bugs == 0


def test_a_bug_in_a_backend_is_logged_counted_and_answered_with_eio(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Pump(raising(ZeroDivisionError("oops"))) as pump:
        assert pump.ask(request(READ, 512, 512)) == [(1, 5, b"")]
        assert pump.ask(request(READ, 512, 512)) == [(1, 5, b"")]
        assert pump.connection.counters.bugs == 2
    assert "read of 512 bytes at 512 failed: oops" in caplog.text
    assert "Traceback" in caplog.text


def test_failures_do_not_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with Pump(raising(OSError(errno.EIO, "no"))) as pump:
        pump.send(request(READ, 0, 512) * 500)
        pump.receive(500 * 16)
        assert pump.connection.counters.errors == 500
    failed = [record for record in caplog.records if "failed" in record.message]
    assert len(failed) == FAILURES_LOGGED


@pytest.mark.parametrize("returned", [b"", bytes(511), bytes(513)])
def test_a_read_of_the_wrong_length_is_never_sent(returned: bytes) -> None:
    channel = CallChannel(null_disk(), lambda _: returned)
    with Pump(channel) as pump:
        assert pump.ask(request(READ, 0, 512) + request(READ, 0, 512, cookie=2)) == [
            (1, 5, b""),
            (2, 5, b""),
        ]
        assert pump.connection.counters.bugs == 2


def test_a_pending_read_of_the_wrong_length_is_never_sent() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512))
        held.finish(data=bytes(100))
        assert pump.receive(16) == reply(1, 5)
        assert pump.connection.counters.bugs == 1


# --- pending requests ---


def test_completions_in_any_order_answer_each_cookie_once() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(b"".join(request(READ, 512 * i, 512, cookie=i) for i in range(8)))
        for index in (3, 0, 5, 1, 3, 2, 1, 0):
            held.finish(index)
        pump.turns()
        found = replies(pump.drain_client(), dict.fromkeys(range(8), 512))
        assert sorted(found) == [(i, 0, pattern(512 * i, 512)) for i in range(8)]
        assert pump.connection.counters.sends == 1
        assert pump.connection.counters.reads == 8
        assert pump.connection.idle


def test_a_pending_failure_is_answered() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(request(WRITE, payload=bytes(512)) + request(FLUSH, cookie=2))
        held.finish(error=errno.ENOSPC)
        held.finish()
        pump.turns()
        assert replies(pump.drain_client(), {}) == [(1, 28, b""), (2, 0, b"")]
        assert (pump.connection.counters.writes, pump.connection.counters.flushes) == (0, 1)


def test_a_lent_buffer_is_released_when_its_data_has_left_and_not_before() -> None:
    held, lent = HeldChannel(null_disk()), Lent()
    with Pump(held, send_buffer=4096) as pump:
        pump.ask(request(READ, 0, 1 << 20))
        held.finish(lent=lent)
        pump.turns()
        assert lent.released == 0
        pump.receive(16 + (1 << 20) - 1)
        pump.turns()
        pump.receive(1)
        assert lent.released == 1


def test_a_lent_buffer_is_given_back_amid_its_data_when_the_peer_does_not_read() -> None:
    held, first, second = HeldChannel(null_disk()), Lent(), Lent()
    with Pump(held, send_buffer=4096) as pump:
        pump.ask(request(READ, 0, 1 << 18) + request(READ, 1 << 19, 1 << 18, cookie=2))
        data = [bytearray(pattern(offset, 1 << 18)) for offset in (0, 1 << 19)]
        held.finish(data=memoryview(data[0]), lent=first)
        pump.turns()
        received = pump.receive(1 << 17)
        held.finish(data=memoryview(data[1]), lent=second)
        assert second.holder is first.holder
        first.holder.give_back()
        assert (first.released, second.released) == (1, 1)
        for buffer in data:
            buffer[:] = bytes(1 << 18)  # somebody else's now
        received += pump.receive(2 * (16 + (1 << 18)) - len(received))
        assert received == reply(1, 0, pattern(0, 1 << 18)) + reply(2, 0, pattern(1 << 19, 1 << 18))
        first.holder.give_back()
        assert (first.released, second.released) == (1, 1)


@pytest.mark.parametrize("when", ["before completion", "after completion", "on failure"])
def test_a_lent_buffer_is_released_once_though_the_peer_is_gone(when: str) -> None:
    held, lent = HeldChannel(null_disk()), Lent()
    with Pump(held, send_buffer=4096) as pump:
        pump.ask(request(READ, 0, 1 << 20))
        if when == "before completion":
            pump.client.close()
            pump.until(lambda: pump.connection._closed)
            assert not pump.closed
            held.finish(lent=lent)
        else:
            held.finish(lent=lent, error=errno.EIO if when == "on failure" else 0)
            pump.turns()
            pump.client.close()
        pump.until(lambda: pump.closed)
        assert lent.released == 1


# --- bounds ---


def test_a_flood_of_small_requests_is_bounded() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.send(b"".join(request(FLUSH, cookie=i) for i in range(QUEUE_MAX * 3)))
        pump.turns(20)
        assert QUEUE_MAX <= len(held.pending) <= 2 * QUEUE_MAX
        assert not pump.connection._events & READABLE
        seen = []
        for _ in range(50):
            seen += [cookie for cookie, *_ in held.submitted]
            held.submitted.clear()
            held.finish_all()
            pump.turns(2)
        assert seen == list(range(QUEUE_MAX * 3))
        assert pump.connection.counters.flushes == QUEUE_MAX * 3
        assert pump.connection._events == READABLE


def test_a_peer_that_reads_no_replies_is_bounded() -> None:
    with Pump() as pump:
        flood = request(FLUSH) * 1000
        for _ in range(200):
            pump.turns(2)
            try:
                pump.client.send(flood)
            except BlockingIOError:
                break
        else:
            pytest.fail("the connection received without end")
        outgoing = pump.connection._outgoing
        assert len(outgoing.buffers) <= 4 * QUEUE_MAX


def test_28_bytes_that_ask_for_32_mib_count_as_32_mib() -> None:
    held = HeldChannel(null_disk())
    with Pump(held, export=export(size=1 << 30)) as pump:
        pump.send(b"".join(request(READ, 0, 16 << 20, cookie=i) for i in range(20)))
        pump.turns(20)
        assert len(held.pending) == CLIENT_BYTES_MAX // (16 << 20)
        for _ in range(18):
            held.finish(error=errno.EIO)
            pump.turns()
            assert len(held.pending) <= CLIENT_BYTES_MAX // (16 << 20)
        assert [cookie for cookie, *_ in held.submitted] == list(range(20))


def test_large_reads_that_nobody_takes_are_bounded_by_their_bytes() -> None:
    with Pump(export=export(size=1 << 30), disk=null_disk(1 << 30), send_buffer=65536) as pump:
        pump.send(b"".join(request(READ, 0, MAX_PAYLOAD, cookie=i) for i in range(100)))
        pump.turns(50)
        assert pump.connection._outgoing.waiting <= CLIENT_BYTES_MAX + MAX_PAYLOAD
        assert not pump.connection._events & READABLE


def test_payloads_stay_valid_while_they_wait() -> None:
    held = HeldChannel(null_disk(), room=2)
    with Pump(held) as pump:
        payloads = [bytes([i]) * 512 for i in range(40)]
        pump.send(
            b"".join(request(WRITE, 512 * i, cookie=i, payload=p) for i, p in enumerate(payloads))
        )
        pump.turns()
        pump.send(request(WRITE, 0, cookie=99, payload=b"\xff" * 512))  # must not be received over
        pump.turns()
        while held.pending:
            held.finish_all()
            pump.turns()
        assert [entry[3] for entry in held.submitted] == [*payloads, b"\xff" * 512]


def test_a_busy_channel_gets_everything_in_order_and_nothing_twice() -> None:
    held = HeldChannel(null_disk(), room=3)
    with Pump(held) as pump:
        pump.send(b"".join(request(READ, 512 * i, 512, cookie=i) for i in range(100)))
        pump.turns()
        assert [cookie for cookie, *_ in held.submitted] == [0, 1, 2]
        while held.pending:
            held.finish_all()
            pump.turns()
        assert [cookie for cookie, *_ in held.submitted] == list(range(100))
        assert pump.connection.counters.reads == 100
        assert pump.connection._events == READABLE


def test_a_busy_channel_is_not_asked_again_before_it_says_so() -> None:
    held = HeldChannel(null_disk(), room=1)
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512, cookie=1) + request(READ, 0, 512, cookie=2))
        held.finish()  # there is room now, but others may have waited longer
        pump.turns()
        assert [cookie for cookie, *_ in held.submitted] == [1]
        held.room()
        assert [cookie for cookie, *_ in held.submitted] == [1, 2]
        held.finish_all()
        pump.turns()

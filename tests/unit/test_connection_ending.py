"""Every way a connection ends, what it finishes first, and how it begins."""

from __future__ import annotations

import errno
import logging
import socket
import struct

import pytest

from backends.api import DONE, Buffer, Request
from reactor.protocol.wire import MAX_PAYLOAD
from tests.unit.pumping import CallChannel, HeldChannel, Pump, null_disk, pattern
from tests.unit.requests import export, replies, reply, request

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)


def test_disconnect_finishes_what_is_in_flight_and_closes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512) + request(DISC) + request(READ, 0, 512, cookie=2))
        assert not pump.closed
        held.finish()
        pump.until(lambda: pump.closed)
        assert pump.drain_client() == reply(1, data=pattern(0, 512))
        assert pump.client.recv(1) == b""
        assert pump.closed == ["the client disconnected"]
        assert len(held.submitted) == 1
    assert caplog.text.count("the client disconnected") == 1


def test_the_end_of_the_stream_finishes_what_is_in_flight() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.send(request(READ, 0, 512))
        pump.client.shutdown(socket.SHUT_WR)
        pump.turns()
        held.finish()
        pump.until(lambda: pump.closed)
        assert pump.drain_client() == reply(1, data=pattern(0, 512))


@pytest.mark.parametrize("resends", [False, True])
def test_what_a_peer_that_hung_up_left_is_done_only_if_it_does_not_send_it_again(
    resends: bool,
) -> None:
    """By the time that a worker wakes up, the kernel may have written something newer elsewhere."""
    held = HeldChannel(null_disk())
    with Pump(held, resends=resends) as pump:
        pump.client.send(request(WRITE, payload=bytes(512)))
        pump.client.close()
        pump.turns()
        assert len(held.submitted) == (0 if resends else 1)
        for _ in list(held.pending):
            held.finish()
        pump.until(lambda: pump.closed)


def test_a_peer_that_closes_in_the_middle_of_a_payload_is_told_apart() -> None:
    with Pump() as pump:
        pump.send(request(WRITE, payload=bytes(4096))[:1000])
        pump.turns()
        pump.client.close()
        pump.until(lambda: pump.closed)
        assert pump.closed == ["the peer closed it in the middle of a request"]


def test_a_peer_that_is_gone_while_nothing_is_received_ends_the_connection() -> None:
    held = HeldChannel(null_disk(), room=1)
    with Pump(held) as pump:
        pump.send(request(READ, 0, 512) * 3)
        pump.turns()
        pump.client.close()
        pump.until(lambda: pump.connection._closed)
        assert not pump.closed, "a request is still in flight"
        held.finish_all()
        pump.until(lambda: pump.closed)
        assert len(held.submitted) == 1


def test_a_reset_ends_the_connection() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listener.getsockname())
    served, _ = listener.accept()
    listener.close()
    with Pump() as pump:
        pump.client.close()
        pump.until(lambda: pump.closed)
        pump.closed.clear()
        pump.served = served
        pump.connection = type(pump.connection)(
            pump.reactor, served, pump.export, pump.channel, pump._on_closed
        )
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        pump.until(lambda: pump.closed)
        assert "reset" in pump.closed[0]


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\nHost: disk\r\n\r\n", bytes(28), b"\xff" * 99]
)
def test_garbage_ends_the_connection_after_the_replies_that_are_due(garbage: bytes) -> None:
    with Pump() as pump:
        pump.send(request(READ, 0, 512) + garbage)
        pump.until(lambda: pump.closed)
        assert pump.drain_client() == reply(1, data=bytes(512))
        assert "magic" in pump.closed[0]


def test_a_write_beyond_32_mib_ends_the_connection() -> None:
    with Pump() as pump:
        pump.send(request(WRITE, 0, MAX_PAYLOAD + 1))
        pump.until(lambda: pump.closed)
        assert str(MAX_PAYLOAD) in pump.closed[0]


def test_drain_answers_what_was_received_and_receives_no_more() -> None:
    held = HeldChannel(null_disk(), room=2)
    with Pump(held) as pump:
        pump.ask(b"".join(request(READ, 0, 512, cookie=i) for i in range(5)))
        pump.connection.drain(60)
        pump.turns()
        pump.send(request(READ, 0, 512, cookie=9))
        while held.pending:
            held.finish_all()
            pump.turns()
        pump.until(lambda: pump.closed)
        found = replies(pump.drain_client(), dict.fromkeys(range(5), 512))
        assert [cookie for cookie, _, _ in found] == list(range(5))
        assert pump.closed == ["drained"]


def test_drain_of_an_idle_connection_closes_it() -> None:
    with Pump() as pump:
        assert pump.connection.idle
        pump.connection.drain(60)
        pump.until(lambda: pump.closed)
        assert pump.closed == ["drained"]


def test_drain_ends_by_force_at_its_deadline() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512))
        pump.connection.drain(0)
        pump.until(lambda: pump.connection._closed)
        assert pump.client.recv(1) == b""
        assert not pump.closed, "a request is still in flight"
        held.finish()
        pump.until(lambda: pump.closed)
        assert len(pump.closed) == 1
        assert "not finished in 0 s" in pump.closed[0]


def test_a_second_drain_shortens_the_deadline() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512))
        pump.connection.drain(3600)
        pump.connection.drain(0)
        pump.until(lambda: pump.connection._closed)
        held.finish()
        pump.until(lambda: pump.closed)


def test_a_drain_that_is_said_again_is_not_put_off() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        now = pump.reactor.clock()
        pump.reactor.clock = lambda: now
        pump.ask(request(READ, 0, 512))
        for _ in range(5):  # as a controller says it that has yet to hear of its end
            assert pump.connection._closed is None
            pump.connection.drain(10)
            now += 2_000_000_000
            pump.turns()
        assert pump.connection._closed == "drained, but not finished in 10 s"
        held.finish()
        pump.until(lambda: pump.closed)


def _take_slowly(pump: Pump, seconds: int) -> int:
    """Read what a peer that has ended is sent, `seconds` apart; returns how much came."""
    now = pump.reactor.clock()
    pump.reactor.clock = lambda: now
    received = 0
    for _ in range(1000):
        received += len(pump.drain_client())
        pump.turns()
        if pump.closed:
            break
        now += seconds * 1_000_000_000
        pump.turns()
    return received + len(pump.drain_client())


@pytest.mark.parametrize("end", [request(DISC), b"X" * 28])
def test_a_peer_that_ended_gets_its_replies_as_long_as_it_takes_them(end: bytes) -> None:
    with Pump(send_buffer=4096) as pump:
        pump.send(request(READ, 0, 1 << 17) + end)
        assert _take_slowly(pump, 9) == 16 + (1 << 17)
        assert "not finished" not in pump.closed[0]


def test_but_not_for_ever() -> None:
    with Pump(send_buffer=4096) as pump:
        pump.send(request(READ, 0, 1 << 20) + request(DISC))
        assert 4096 < _take_slowly(pump, 9) < 1 << 20
        assert pump.closed == ["the client disconnected, but not finished in 10 s"]


def test_a_peer_that_ended_and_takes_no_replies_is_dropped() -> None:
    with Pump(send_buffer=4096) as pump:
        pump.send(request(READ, 0, 1 << 20) + request(DISC))
        pump.until(lambda: pump.connection._ending and pump.connection._blocked)
        now = pump.reactor.clock()
        pump.reactor.clock = lambda: now
        for _ in range(2):  # the first replies left when it had ended
            now += 11_000_000_000
            pump.turns()
        assert pump.closed == ["the client disconnected, but not finished in 10 s"]


def test_drain_ends_though_the_peer_takes_no_replies() -> None:
    with Pump(send_buffer=4096) as pump:
        pump.send(request(READ, 0, 1 << 20))
        pump.turns()
        pump.connection.drain(0)
        pump.until(lambda: pump.closed)


def test_refuse_answers_everything_with_eshutdown_and_finishes_what_is_in_flight() -> None:
    held = HeldChannel(null_disk(), room=1)
    with Pump(held, export=export(size=64 << 20)) as pump:
        pump.ask(b"".join(request(READ, 0, 512, cookie=i) for i in range(3)))
        pump.connection.refuse()
        pump.turns()
        assert replies(pump.drain_client(), {}) == [(1, 108, b""), (2, 108, b"")]
        held.finish()
        pump.turns()
        assert replies(pump.drain_client(), {0: 512}) == [(0, 0, pattern(0, 512))]
        pump.send(request(WRITE, cookie=7, payload=bytes(8 << 20)) + request(FLUSH, cookie=8))
        assert pump.receive(32) == reply(7, 108) + reply(8, 108)
        assert len(held.submitted) == 1
        assert pump.connection.idle
        pump.send(request(DISC))
        pump.until(lambda: pump.closed)


def test_close_is_at_once_and_reported_once() -> None:
    held = HeldChannel(null_disk())
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512))
        pump.connection.close("because")
        pump.connection.close("again")
        assert pump.client.recv(1) == b""
        pump.turns()
        assert not pump.closed
        held.finish()
        pump.turns()
        pump.connection.drain(0)
        pump.turns()
        assert pump.closed == ["because"]


def test_close_from_inside_a_submit_is_survived() -> None:
    pump: Pump

    def close(_request: Request) -> Buffer | None:
        pump.connection.close("removed")
        assert not pump.closed
        return DONE

    with Pump(CallChannel(null_disk(), close)) as pump:
        pump.send(request(FLUSH) * 3)
        pump.until(lambda: pump.closed)
        assert pump.closed == ["removed"]


def test_refuse_from_inside_a_submit_is_survived() -> None:
    pump: Pump

    def refuse(_request: Request) -> Buffer | None:
        pump.connection.refuse()
        raise OSError(errno.ESHUTDOWN, "the file is gone")

    with Pump(CallChannel(null_disk(), refuse)) as pump:
        assert pump.ask(request(FLUSH)) == [(1, 108, b"")]
        assert pump.ask(request(FLUSH)) == [(1, 108, b"")]


def test_a_busy_channel_resumes_a_closed_connection_without_harm() -> None:
    held = HeldChannel(null_disk(), room=1)
    with Pump(held) as pump:
        pump.ask(request(READ, 0, 512) * 2)
        pump.connection.close("because")
        held.finish_all()
        pump.until(lambda: pump.closed)
        assert len(held.submitted) == 1


# --- trailing bytes of the handshake ---


def test_bytes_behind_the_handshake_are_requests() -> None:
    stream = request(READ, 0, 512, cookie=1) + request(WRITE, cookie=2, payload=bytes(512))
    with Pump(trailing=stream[:-100]) as pump:
        pump.turns()
        pump.send(stream[-100:])
        assert pump.receive(16 + 512 + 16) == reply(1, data=bytes(512)) + reply(2)


def test_garbage_behind_the_handshake_ends_the_connection_from_the_loop() -> None:
    with Pump(trailing=b"\xff" * 100) as pump:
        assert not pump.closed
        pump.until(lambda: pump.closed)
        assert "magic" in pump.closed[0]


def test_a_disconnect_behind_the_handshake_ends_the_connection() -> None:
    with Pump(trailing=request(DISC)) as pump:
        pump.until(lambda: pump.closed)
        assert pump.closed == ["the client disconnected"]


def test_a_resize_counts_for_the_next_request() -> None:
    with Pump() as pump:
        pump.export.size = 512
        assert pump.ask(request(READ, 512, 512)) == [(1, 22, b"")]
        pump.export.size = 4096
        assert pump.ask(request(READ, 512, 512), _1=512) == [(1, 0, bytes(512))]

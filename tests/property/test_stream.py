"""Whatever the pieces and the order, the streams in and out are the same."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reactor.errors import ProtocolError
from reactor.protocol.transmission import CAPACITY, REQUESTS_MAX, Receiver
from reactor.protocol.wire import MAX_PAYLOAD, SIMPLE_REPLY
from tests.unit.pumping import CallChannel, HeldChannel, Pump, null_disk, pattern
from tests.unit.requests import (
    EVERYTHING,
    READ_ONLY,
    export,
    feed,
    fill,
    plain,
    replies,
    request,
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)
U64 = st.integers(0, (1 << 64) - 1)

OTHERS = st.builds(
    lambda command, offset, length, cookie, flags: request(
        command, offset, length, cookie=cookie, flags=flags
    ),
    st.sampled_from([READ, FLUSH, TRIM, CACHE, ZEROES, 7, 65535]),
    U64,
    st.integers(0, (1 << 32) - 1),
    U64,
    st.integers(0, 65535),
)
LENGTHS = st.one_of(
    st.integers(0, 2000),
    st.sampled_from([4096, 65536, CAPACITY // 2, CAPACITY // 2 + 1, CAPACITY, 3 << 20]),
)
WRITES = st.builds(
    lambda offset, length, cookie, fill: request(
        WRITE, offset, length, cookie=cookie, payload=bytes([fill]) * length
    ),
    st.one_of(st.just(0), U64),
    LENGTHS,
    U64,
    st.integers(0, 255),
)
STREAMS = st.lists(st.one_of(OTHERS, WRITES, WRITES), min_size=1, max_size=12)
EXPORTS = st.builds(
    lambda size, flags: export(size=size, flags=flags, block_size=1),
    st.sampled_from([0, 4096, 1 << 30]),
    st.sampled_from([EVERYTHING, EVERYTHING | READ_ONLY]),
)


def cut(stream: bytes, seed: int, piece_max: int) -> list[bytes]:
    """Cut into pieces of random lengths, few enough to be quick."""
    source = random.Random(seed)
    least = max(1, len(stream) // 2000)
    pieces, position = [], 0
    while position < len(stream):
        length = source.randint(least, max(piece_max, least))
        pieces.append(stream[position : position + length])
        position += length
    return pieces


@given(STREAMS, EXPORTS, U64, st.sampled_from([1, 29, 1000, 100_000, 1 << 20]))
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
def test_any_cut_of_the_stream_gives_the_same_requests(
    stream: list[bytes], disk: object, seed: int, piece_max: int
) -> None:
    # Each request by itself is the reference.
    expected = [entry for data in stream for entry in feed(Receiver(disk), [data])]  # type: ignore[arg-type]
    assert len(expected) == len(stream)
    found = feed(Receiver(disk), cut(b"".join(stream), seed, piece_max))  # type: ignore[arg-type]
    assert [cookie for _, _, cookie, *_ in found] == [cookie for _, _, cookie, *_ in expected]
    for one, other in zip(found, expected, strict=True):
        # A large payload that is refused is not kept where it does not fit the buffer; whether
        # it fits depends on the cut, and the request is refused either way.
        if one[5] is not None and other[5] is not None:
            assert one == other
        else:
            assert one[1:5] == other[1:5]


@given(
    st.lists(st.one_of(OTHERS, WRITES, st.binary(max_size=60)), max_size=8),
    st.lists(st.integers(1, 3000), min_size=1, max_size=20),
)
@example([b"\x25\x60\x95\x13" + b"\0\0\0\1" + b"\xff" * 20], [28])
@settings(max_examples=300, suppress_health_check=list(HealthCheck))
def test_any_bytes_give_requests_or_a_protocol_error(chunks: list[bytes], sizes: list[int]) -> None:
    receiver = Receiver(export(size=1 << 40, block_size=1))
    left = memoryview(b"".join(chunks))
    turn = 0
    while left and receiver.error is None:
        most = sizes[turn % len(sizes)] if len(left) < 50_000 else 1 << 20
        turn += 1
        count = fill(receiver.recv_spaces(), left[:most])
        left = left[count:]
        found = receiver.received(count)
        assert len(found) <= REQUESTS_MAX + 1
        while receiver.more:
            plain(receiver.received(0))
        held = 0 if receiver._large is None else len(receiver._large)
        assert held <= MAX_PAYLOAD
        assert len(receiver._buffer) == CAPACITY
    if receiver.error is not None:
        with pytest.raises(ProtocolError):
            receiver.recv_spaces()


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=60),
    st.integers(2048, 60_000),
    st.lists(st.integers(1, 50_000), min_size=1, max_size=10),
)
@settings(max_examples=40)
def test_whatever_the_socket_takes_at_a_time_the_replies_are_the_same(
    blocks: list[int], send_buffer: int, takes: list[int]
) -> None:
    disk = null_disk(1 << 20)
    channel = CallChannel(disk, lambda r: pattern(r[3], r[4]))
    with Pump(channel, send_buffer=send_buffer) as pump:
        pump.send(b"".join(request(READ, 512 * i, 512 * n, cookie=i) for i, n in enumerate(blocks)))
        total = sum(SIMPLE_REPLY.size + 512 * n for n in blocks)
        received, turn = b"", 0
        while len(received) < total:
            received += pump.receive(min(takes[turn % len(takes)], total - len(received)))
            turn += 1
        reads = {i: 512 * n for i, n in enumerate(blocks)}
        assert replies(received, reads) == [
            (i, 0, pattern(512 * i, 512 * n)) for i, n in enumerate(blocks)
        ]
        pump.turns()
        assert pump.connection.idle


@given(st.data(), st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=60)
def test_completions_in_any_order_answer_each_cookie_exactly_once(
    data: st.DataObject, count: int, room: int
) -> None:
    held = HeldChannel(null_disk(), room)
    with Pump(held, send_buffer=8192) as pump:
        pump.send(
            b"".join(
                request(READ, 512 * i, 512, cookie=i)
                if i % 3
                else request(WRITE, 512 * i, cookie=i, payload=pattern(512 * i, 512))
                for i in range(count)
            )
        )
        pump.turns()
        stream = b""
        while held.pending:
            held.finish(data.draw(st.integers(0, len(held.pending) - 1)))
            if data.draw(st.booleans()):
                held.room()
            if data.draw(st.booleans()):
                pump.turns(1)
            stream += pump.drain_client()
            if not held.pending:
                held.room()
        while not pump.connection.idle:
            pump.turns(1)
            stream += pump.drain_client()
        stream += pump.drain_client()
        reads = {i: 512 for i in range(count) if i % 3}
        expected = [(i, 0, pattern(512 * i, 512) if i % 3 else b"") for i in range(count)]
        assert sorted(replies(stream, reads)) == expected
        assert [cookie for cookie, *_ in held.submitted] == list(range(count))

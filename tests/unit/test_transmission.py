"""Bytes to requests, in whatever pieces they come; and which requests are refused."""

from __future__ import annotations

import errno
import weakref
from pathlib import Path

import pytest

from reactor.errors import ProtocolError
from reactor.protocol.transmission import (
    CAPACITY,
    IN_PLACE_MAX,
    REFUSED,
    REQUESTS_MAX,
    Receiver,
    validate,
)
from reactor.protocol.wire import MAX_PAYLOAD
from tests.unit.requests import (
    EVERYTHING,
    READ_ONLY,
    Plain,
    bytewise,
    export,
    feed,
    fill,
    plain,
    request,
)

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES = range(7)
FUA, NO_HOLE, DF, FAST_ZERO = 1, 2, 4, 16
FAST = 1 << 11

# magic 25609513, flags, type, cookie, offset, length: doc/proto.md, "Request message".
GOLDEN: dict[str, tuple[str, Plain]] = {
    "read": (
        "25609513 0000 0000 0102030405060708 0000000000001000 00000200",
        (READ, 0, 0x0102030405060708, 0x1000, 0x200, None),
    ),
    "write": (
        "25609513 0001 0001 ffffffffffffffff 0000000000000000 00000004 deadbeef",
        (WRITE, FUA, 0xFFFFFFFFFFFFFFFF, 0, 4, b"\xde\xad\xbe\xef"),
    ),
    "empty write": (
        "25609513 0000 0001 0000000000000000 0000000000000000 00000000",
        (WRITE, 0, 0, 0, 0, b""),
    ),
    "flush": (
        "25609513 0000 0003 0000000000000001 0000000000000000 00000000",
        (FLUSH, 0, 1, 0, 0, None),
    ),
    "trim": (
        "25609513 0000 0004 0000000000000002 fffffffffffff000 ffffffff",
        (TRIM, 0, 2, 0xFFFFFFFFFFFFF000, 0xFFFFFFFF, None),
    ),
    "cache": (
        "25609513 0000 0005 0000000000000003 0000000000000000 00001000",
        (CACHE, 0, 3, 0, 0x1000, None),
    ),
    "write zeroes": (
        "25609513 0002 0006 0000000000000004 0000000000000000 00001000",
        (ZEROES, NO_HOLE, 4, 0, 0x1000, None),
    ),
    "unknown": (
        "25609513 ffff 002a 0000000000000005 0000000000000000 00001000",
        (42, 0xFFFF, 5, 0, 0x1000, None),
    ),
    "disconnect": (
        "25609513 0000 0002 0000000000000000 0000000000000000 00000000",
        (DISC, 0, 0, 0, 0, None),
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_a_request_is_the_same_whole_bytewise_and_with_trailing_bytes(name: str) -> None:
    text, expected = GOLDEN[name]
    data = bytes.fromhex(text)
    trailing = request(READ, cookie=99)[:20]
    for pieces in ([data], bytewise(data), [data + trailing]):
        assert feed(Receiver(export()), pieces) == [expected]


def test_many_requests_in_one_receive_come_in_their_order() -> None:
    stream = b"".join(bytes.fromhex(text) for text, _ in GOLDEN.values())
    assert feed(Receiver(export()), [stream]) == [expected for _, expected in GOLDEN.values()]


def test_a_wrong_magic_loses_the_stream_for_good() -> None:
    receiver = Receiver(export())
    good = request(READ, cookie=7)
    assert feed(receiver, [good + b"\x25\x60\x95\x14" + bytes(24) + good]) == [
        (READ, 0, 7, 0, 0, None)
    ]
    assert isinstance(receiver.error, ProtocolError)
    assert "0x25609514" in str(receiver.error)
    with pytest.raises(ProtocolError):
        receiver.recv_spaces()
    with pytest.raises(ProtocolError):
        receiver.received(0)


def test_what_follows_a_disconnect_is_not_read() -> None:
    receiver = Receiver(export())
    stream = request(DISC) + request(READ) + b"garbage of more than one header's length"
    assert [found[0] for found in feed(receiver, [stream, stream])] == [DISC]
    assert receiver.error is None


@pytest.mark.parametrize("length", [IN_PLACE_MAX, IN_PLACE_MAX + 1, CAPACITY, MAX_PAYLOAD])
def test_a_large_payload_arrives_whole(length: int) -> None:
    payload = b"0123456789abcdef" * (length // 16) + b"x" * (length % 16)
    stream = request(READ) + request(WRITE, payload=payload) + request(FLUSH)
    pieces = [stream[i : i + 200_001] for i in range(0, len(stream), 200_001)]
    found = feed(Receiver(export(size=64 << 20, block_size=1)), pieces)
    assert [entry[0] for entry in found] == [READ, WRITE, FLUSH]
    assert found[1][5] == payload


def test_large_payloads_in_a_row_are_told_apart() -> None:
    payloads = [bytes([i]) * (IN_PLACE_MAX + 512 * i) for i in (3, 1, 2)]
    stream = b"".join(request(WRITE, payload=payload) for payload in payloads)
    pieces = [stream[i : i + 300_000] for i in range(0, len(stream), 300_000)]
    found = feed(Receiver(export(size=64 << 20)), pieces)
    assert [entry[5] for entry in found] == payloads


def test_the_memory_of_a_large_payload_is_not_kept_for_small_ones() -> None:
    receiver = Receiver(export(size=64 << 20))
    stream = request(WRITE, payload=bytes(8 << 20))
    pieces = [stream[i : i + 300_000] for i in range(0, len(stream), 300_000)]
    feed(receiver, pieces)
    feed(receiver, [request(READ), request(READ)])
    assert receiver._large is None
    assert receiver._given is None
    assert receiver._spare is None


def test_at_rest_no_large_payload_is_kept() -> None:
    receiver = Receiver(export(size=64 << 20))
    feed(receiver, [request(WRITE, payload=bytes(8 << 20))])
    payload = weakref.ref(receiver._given.obj)  # type: ignore[union-attr]
    receiver.rest()
    assert payload() is None


def test_a_payload_beyond_the_maximum_loses_the_stream() -> None:
    receiver = Receiver(export(size=1 << 40))
    assert feed(receiver, [request(WRITE, length=MAX_PAYLOAD + 1)]) == []
    assert receiver.error is not None


@pytest.mark.parametrize(
    ("flags", "size", "expected"),
    [
        (EVERYTHING | READ_ONLY, 64 << 20, errno.EPERM),
        (EVERYTHING, 1 << 20, errno.ENOSPC),
        (EVERYTHING & ~8, 64 << 20, errno.EINVAL),
    ],
)
def test_a_large_payload_that_is_refused_is_consumed_without_keeping_it(
    flags: int, size: int, expected: int
) -> None:
    receiver = Receiver(export(size=size, flags=flags))
    stream = request(WRITE, cookie=5, flags=FUA, payload=bytes(MAX_PAYLOAD)) + request(READ)
    pieces = [stream[i : i + 1_000_000] for i in range(0, len(stream), 1_000_000)]
    found = feed(receiver, pieces)
    assert found == [
        (REFUSED | expected, FUA, 5, 0, MAX_PAYLOAD, None),
        (READ, 0, 1, 0, 0, None),
    ]
    assert receiver._large is None
    assert receiver._spare is None


def test_no_client_can_send_the_mark_of_a_refused_request() -> None:
    found = feed(Receiver(export()), [request(0xFFFF)])
    assert not found[0][0] & REFUSED


def test_a_flood_of_headers_comes_in_bounded_batches() -> None:
    receiver = Receiver(export())
    count = REQUESTS_MAX * 2 + 5
    flood = b"".join(request(READ, cookie=i) for i in range(count))
    fill(receiver.recv_spaces(), flood)
    batches = [plain(receiver.received(len(flood)))]
    while receiver.more:
        batches.append(plain(receiver.received(0)))
    assert [len(batch) for batch in batches] == [REQUESTS_MAX, REQUESTS_MAX, 5]
    assert [entry[2] for batch in batches for entry in batch] == list(range(count))


def test_a_full_batch_that_ends_the_input_has_nothing_more() -> None:
    receiver = Receiver(export())
    flood = request(READ) * REQUESTS_MAX
    fill(receiver.recv_spaces(), flood)
    assert len(receiver.received(len(flood))) == REQUESTS_MAX
    assert not receiver.more


def test_there_is_always_space_for_a_batch() -> None:
    receiver = Receiver(export(size=64 << 20))
    stream = request(WRITE, payload=bytes(IN_PLACE_MAX - 512)) * 5
    for i in range(0, len(stream), 65_536):
        piece = stream[i : i + 65_536]
        spaces = receiver.recv_spaces()
        assert len(spaces[-1]) >= 256 << 10
        assert fill(spaces, piece) == len(piece)
        receiver.received(len(piece))


@pytest.mark.parametrize("cut", [1, 27, 28, 29, 100])
def test_a_request_that_has_begun_is_known(cut: int) -> None:
    receiver = Receiver(export())
    stream = request(WRITE, payload=bytes(100))
    assert not receiver.within_request
    feed(receiver, [stream[:cut]])
    assert receiver.within_request
    feed(receiver, [stream[cut:]])
    assert not receiver.within_request


SIZE = 1 << 20
END = (1 << 64) - 512


@pytest.mark.parametrize(
    ("command", "flags", "offset", "length", "expected"),
    [
        (READ, 0, 0, SIZE, 0),
        (READ, 0, SIZE - 512, 512, 0),
        (READ, 0, SIZE, 0, 0),
        (READ, 0, SIZE, 512, errno.EINVAL),
        (READ, 0, END, 1024, errno.EINVAL),
        (READ, 0, 1, 512, errno.EINVAL),
        (READ, 0, 0, 511, errno.EINVAL),
        (READ, FUA, 0, 512, 0),
        (READ, DF, 0, 512, errno.EINVAL),
        (READ, NO_HOLE, 0, 512, errno.EINVAL),
        (WRITE, 0, SIZE - 512, 512, 0),
        (WRITE, FUA, 0, 512, 0),
        (WRITE, 0, SIZE - 512, 1024, errno.ENOSPC),
        (WRITE, 0, END, 1024, errno.ENOSPC),
        (WRITE, 0, 0, 100, errno.EINVAL),
        (WRITE, NO_HOLE, 0, 512, errno.EINVAL),
        (FLUSH, 0, 0, 0, 0),
        (FLUSH, FUA, 0, 0, 0),
        (FLUSH, 0, 512, 0, errno.EINVAL),
        (FLUSH, 0, 0, 512, errno.EINVAL),
        (TRIM, 0, 0, SIZE, 0),
        (TRIM, FUA, 0, 512, 0),
        (TRIM, 0, 512, SIZE, errno.EINVAL),
        (TRIM, NO_HOLE, 0, 512, errno.EINVAL),
        (CACHE, 0, 0, SIZE, 0),
        (CACHE, 0, 512, SIZE, errno.EINVAL),
        (ZEROES, 0, 0, SIZE, 0),
        (ZEROES, NO_HOLE | FUA, 0, 512, 0),
        (ZEROES, FAST_ZERO, 0, 512, errno.EINVAL),
        (ZEROES, 0, 512, SIZE, errno.ENOSPC),
        (7, 0, 0, 512, errno.EINVAL),
        (65535, 0, 0, 512, errno.EINVAL),
        (READ, 1 << 15, 0, 512, errno.EINVAL),
    ],
)
def test_a_request_is_judged(
    command: int, flags: int, offset: int, length: int, expected: int
) -> None:
    judged = validate((command, flags, 1, offset, length, None), export(size=SIZE))
    assert errno.errorcode.get(judged, 0) == errno.errorcode.get(expected, 0)


@pytest.mark.parametrize("command", [WRITE, TRIM, ZEROES])
def test_a_read_only_export_refuses_every_change(command: int) -> None:
    for flags in (EVERYTHING | READ_ONLY, READ_ONLY | 1):
        request = (command, 0, 1, 0, 512, None)
        assert validate(request, export(flags=flags)) == errno.EPERM


@pytest.mark.parametrize(("command", "flag"), [(FLUSH, 4), (TRIM, 32), (ZEROES, 64), (CACHE, 1024)])
def test_what_was_not_offered_is_refused(command: int, flag: int) -> None:
    length = 0 if command == FLUSH else 512
    request = (command, 0, 1, 0, length, None)
    assert validate(request, export(flags=EVERYTHING)) == 0
    assert validate(request, export(flags=EVERYTHING & ~flag)) == errno.EINVAL


@pytest.mark.parametrize("command", [READ, WRITE, FLUSH, TRIM, CACHE, ZEROES])
def test_fua_is_taken_on_every_command_where_it_is_offered_and_on_none_elsewhere(
    command: int,
) -> None:
    length = 0 if command == FLUSH else 512
    request = (command, FUA, 1, 0, length, None)
    assert validate(request, export(flags=EVERYTHING)) == 0
    assert validate(request, export(flags=EVERYTHING & ~8)) == errno.EINVAL


def test_fast_zero_is_taken_where_it_is_offered() -> None:
    request = (ZEROES, FAST_ZERO, 1, 0, 512, None)
    assert validate(request, export(flags=EVERYTHING | FAST)) == 0


def test_a_read_beyond_the_maximum_payload_overflows() -> None:
    large = export(size=1 << 40)
    assert validate((READ, 0, 1, 0, MAX_PAYLOAD, None), large) == 0
    assert validate((READ, 0, 1, 0, MAX_PAYLOAD + 512, None), large) == errno.EOVERFLOW


def test_trims_and_zeroes_may_be_longer_than_a_payload() -> None:
    large = export(size=1 << 40)
    for command in (TRIM, ZEROES, CACHE):
        assert validate((command, 0, 1, 0, 0xFFFFFE00, None), large) == 0


def test_the_size_is_the_one_of_now() -> None:
    disk = export(size=1024)
    request = (READ, 0, 1, 512, 1024, None)
    assert validate(request, disk) == errno.EINVAL
    disk.size = 2048
    assert validate(request, disk) == 0


def test_at_rest_the_buffer_takes_no_memory_and_goes_on_after() -> None:
    receiver = Receiver(export(size=64 << 20))
    payload = bytes(range(256)) * 2048
    assert len(feed(receiver, [request(WRITE, payload=payload)])) == 1
    before = resident()
    receiver.rest()
    assert resident() <= before - len(payload) // 2
    stream = request(WRITE, payload=payload)
    feed(receiver, [stream[:1000]])
    receiver.rest()  # in the middle of a request it keeps what has come
    assert feed(receiver, [stream[1000:]])[0][5] == payload


def resident() -> int:
    """Return the bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

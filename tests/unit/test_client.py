"""The client's side against bytes written down from the specification."""

from __future__ import annotations

import pytest

from reactor.errors import ProtocolError, ReactorError
from reactor.protocol.client import Negotiation, Transmission
from tests.unit.test_handshake import (
    ACK,
    INFO,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    SERVER,
    SIZE,
    UNKNOWN,
    UNSUP,
    info,
    option,
    reply,
)

GREETING = b"NBDMAGICIHAVEOPT" + bytes.fromhex("0003")


def negotiate(stream: bytes, name: str = "disk") -> tuple[Negotiation, bytes]:
    """Feed the stream whole, byte by byte and with replies behind it; all must agree."""
    whole, bytewise, followed = Negotiation(name), Negotiation(name), Negotiation(name)
    sent = whole.receive(stream)
    assert b"".join(bytewise.receive(bytes([byte])) for byte in stream) == sent
    assert followed.receive(stream + b"replies") == sent
    assert whole.export == bytewise.export == followed.export
    if whole.export is not None:
        assert followed.trailing == b"replies"
    return whole, sent


def test_the_client_asks_for_its_export_with_go() -> None:
    _, sent = negotiate(GREETING)
    assert sent == bytes.fromhex("00000003") + option(7, info(b"disk", 1, 2, 3))


def test_the_client_does_not_ask_for_what_the_server_cannot() -> None:
    _, sent = negotiate(b"NBDMAGICIHAVEOPT" + bytes.fromhex("0001"))
    assert sent.startswith(bytes.fromhex("00000001"))


def test_the_client_learns_what_it_is_told() -> None:
    told = (INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE, b"\x00\x63unknown")
    stream = GREETING + b"".join(reply(7, INFO, data) for data in told) + reply(7, ACK)
    negotiation, _ = negotiate(stream, name="")
    export = negotiation.export
    assert export is not None
    assert (export.name, export.description) == ("disk", "malloc disk")
    assert (export.size, export.flags) == (SIZE, 0x0105)
    assert (export.block_size, export.preferred_block_size) == (512, 4096)
    assert export.maximum_payload == 32 << 20


def test_the_client_may_use_any_offset_when_no_block_size_is_told() -> None:
    negotiation, _ = negotiate(GREETING + reply(7, INFO, INFO_EXPORT) + reply(7, ACK))
    assert negotiation.export is not None
    assert negotiation.export.block_size == 1


@pytest.mark.parametrize(
    ("kind", "message", "said"),
    [
        (UNKNOWN, b"no such disk", "the server refuses export 'disk': no such disk"),
        (UNSUP, b"", "the server refuses export 'disk': error 0x80000001"),
        (UNSUP, b"\xff", "the server refuses export 'disk': \N{REPLACEMENT CHARACTER}"),
    ],
)
def test_a_refusal_is_told_with_the_servers_words(kind: int, message: bytes, said: str) -> None:
    with pytest.raises(ReactorError) as refusal:
        negotiate(GREETING + reply(7, kind, message))
    assert str(refusal.value) == said


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(b"SSH-2.0-OpenSSH_9.2", id="another protocol"),
        pytest.param(b"NBDMAGIC" + bytes.fromhex("0000420281861253") + bytes(8), id="oldstyle"),
        pytest.param(GREETING[:-2] + bytes(2), id="newstyle that is not fixed"),
        pytest.param(GREETING + bytes(20), id="bad reply magic"),
        pytest.param(GREETING + reply(3, ACK), id="reply to another option"),
        pytest.param(GREETING + reply(7, ACK), id="no size"),
        pytest.param(GREETING + reply(7, SERVER), id="reply of another option"),
        pytest.param(GREETING + reply(7, INFO), id="empty information"),
        pytest.param(GREETING + reply(7, INFO, INFO_EXPORT[:-1]), id="cut information"),
        pytest.param(GREETING + reply(7, INFO, b"\x00\x01\xff"), id="name not UTF-8"),
        pytest.param(
            GREETING + reply(7, INFO, bytes.fromhex("0003 00000003 00001000 02000000")),
            id="block size no power of two",
        ),
        pytest.param(GREETING + reply(7, INFO, bytes(12))[:-16] + b"\xff" * 4, id="4 GiB reply"),
        pytest.param(GREETING + reply(7, INFO, INFO_EXPORT) * 65, id="endless information"),
    ],
)
def test_a_server_that_breaks_the_protocol_is_left(stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        Negotiation("disk").receive(stream)


# --- transmission ---


def simple_reply(error: int, cookie: int, data: bytes = b"") -> bytes:
    words = bytes.fromhex("67446698") + error.to_bytes(4, "big") + cookie.to_bytes(8, "big")
    return words + data


def test_a_request_is_packed_as_the_specification_says() -> None:
    packed = Transmission().request(1, 0x0102030405060708, 0x1000, 512, flags=1)
    assert packed == bytes.fromhex("25609513 0001 0001 0102030405060708 0000000000001000 00000200")


def test_replies_are_paired_in_any_order_and_any_pieces() -> None:
    stream = simple_reply(0, 2) + simple_reply(0, 1, b"data") + simple_reply(5, 3)
    expected = [(2, 0, b""), (1, 0, b"data"), (3, 5, b"")]
    for size in (len(stream), 1, 7):
        transmission = Transmission()
        transmission.request(0, 1, 0, 4)
        transmission.request(1, 2, 0, 4)
        transmission.request(0, 3, 0, 4)
        finished = []
        for at in range(0, len(stream), size):
            finished += transmission.receive(stream[at : at + size])
        assert finished == expected
        assert transmission.outstanding == 0


def test_a_disconnect_waits_for_no_reply() -> None:
    transmission = Transmission()
    transmission.request(2, 1)
    assert transmission.outstanding == 0


def test_a_read_of_nothing_is_finished_by_its_header() -> None:
    transmission = Transmission()
    transmission.request(0, 1, 0, 0)
    assert transmission.receive(simple_reply(0, 1)) == [(1, 0, b"")]


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(bytes(16), id="bad magic"),
        pytest.param(simple_reply(0, 2), id="no such request"),
        pytest.param(simple_reply(0, 1, b"data") + simple_reply(0, 1), id="answered twice"),
    ],
)
def test_a_reply_that_makes_no_sense_ends_the_stream(stream: bytes) -> None:
    transmission = Transmission()
    transmission.request(0, 1, 0, 4)
    with pytest.raises(ProtocolError):
        transmission.receive(stream)

"""The server's handshake against bytes written down from the specification."""

from __future__ import annotations

import pytest

from reactor.errors import ProtocolError
from reactor.protocol.export import Export
from reactor.protocol.handshake import (
    GREETING,
    OPTION_DATA_MAX,
    OPTION_SKIP_MAX,
    OPTIONS_MAX,
    Handshake,
)

SIZE = 0x1_0000_0200
FLAGS = 0x0105  # HAS_FLAGS, SEND_FLUSH, CAN_MULTI_CONN

FIXED = bytes.fromhex("00000001")
FIXED_NO_ZEROES = bytes.fromhex("00000003")

INFO_EXPORT = bytes.fromhex("0000 0000000100000200 0105")
INFO_NAME = bytes.fromhex("0001") + b"disk"
INFO_DESCRIPTION = bytes.fromhex("0002") + b"malloc disk"
INFO_BLOCK_SIZE = bytes.fromhex("0003 00000200 00001000 02000000")

ACK, SERVER, INFO = 1, 2, 3
UNSUP, INVALID, UNKNOWN, TOO_BIG = 0x80000001, 0x80000003, 0x80000006, 0x80000009


def disk(name: str = "disk", **changes: object) -> Export:
    settings = {"description": "malloc disk", "size": SIZE, "block_size": 512, "flags": FLAGS}
    return Export(name, **(settings | changes))  # type: ignore[arg-type]


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + number.to_bytes(4, "big") + len(data).to_bytes(4, "big") + data


def info(name: bytes, *wanted: int) -> bytes:
    types = b"".join(kind.to_bytes(2, "big") for kind in wanted)
    return len(name).to_bytes(4, "big") + name + len(wanted).to_bytes(2, "big") + types


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    words = b"".join(word.to_bytes(4, "big") for word in (number, kind, len(data)))
    return bytes.fromhex("0003e889045565a9") + words + data


def kinds(replies: bytes) -> list[int]:
    """The reply types of a stream of option replies."""
    found = []
    while replies:
        found.append(int.from_bytes(replies[12:16], "big"))
        replies = replies[20 + int.from_bytes(replies[16:20], "big") :]
    return found


def feed_bytewise(handshake: Handshake, stream: bytes) -> bytes:
    return b"".join(handshake.receive(bytes([byte])) for byte in stream)


def negotiate(stream: bytes, exports: dict[str, Export] | None = None) -> tuple[Handshake, bytes]:
    """Feed the stream whole, byte by byte and with requests behind it; all must agree."""
    exports = {"disk": disk()} if exports is None else exports
    whole = Handshake(exports)
    replies = whole.receive(stream)
    bytewise = Handshake(exports)
    assert feed_bytewise(bytewise, stream) == replies
    assert (bytewise.export, bytewise.finished) == (whole.export, whole.finished)
    if whole.export is not None:
        followed = Handshake(exports)
        assert followed.receive(stream + b"requests") == replies
        assert followed.trailing == b"requests"
        assert whole.trailing == bytewise.trailing == b""
    return whole, replies


def refused(stream: bytes, exports: dict[str, Export] | None = None) -> str:
    """The ProtocolError that the stream ends in, whole and byte by byte."""
    exports = {"disk": disk()} if exports is None else exports
    with pytest.raises(ProtocolError) as whole:
        Handshake(exports).receive(stream)
    handshake = Handshake(exports)
    with pytest.raises(ProtocolError) as bytewise:
        feed_bytewise(handshake, stream)
    assert str(bytewise.value) == str(whole.value)
    assert handshake.export is None
    return str(whole.value)


def test_the_greeting_offers_fixed_newstyle_without_zeroes() -> None:
    assert bytes.fromhex("4e42444d41474943 49484156454f5054 0003") == GREETING


def test_nothing_is_said_before_the_client_speaks() -> None:
    handshake = Handshake({})
    assert handshake.receive(b"") == b""
    assert handshake.export is None
    assert not handshake.finished


# --- EXPORT_NAME ---


def test_export_name_answers_size_and_flags_and_124_zeroes() -> None:
    handshake, replies = negotiate(FIXED + option(1, b"disk"))
    assert replies == bytes.fromhex("0000000100000200 0105") + bytes(124)
    assert handshake.export is not None
    assert handshake.export.name == "disk"


def test_export_name_leaves_the_zeroes_out_when_agreed() -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(1, b"disk"))
    assert replies == bytes.fromhex("0000000100000200 0105")
    assert handshake.export is not None


def test_export_name_serves_a_client_that_knows_no_fixed_newstyle() -> None:
    handshake, replies = negotiate(bytes(4) + option(1, b"disk"))
    assert len(replies) == 10 + 124
    assert handshake.export is not None


def test_export_name_of_an_unknown_export_drops_the_client() -> None:
    assert refused(FIXED + option(1, b"tape")) == "no export is called 'tape'"


def test_export_name_beyond_the_limit_drops_the_client() -> None:
    assert "export name" in refused(FIXED + option(1, bytes(OPTION_DATA_MAX + 1)))


# --- ABORT ---


def test_abort_is_acknowledged_and_ends_the_session() -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(2))
    assert replies == reply(2, ACK)
    assert handshake.finished
    assert handshake.export is None


def test_abort_may_carry_data() -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(2, b"bye"))
    assert replies == reply(2, ACK)
    assert handshake.finished


# --- LIST ---


def test_list_names_and_describes_every_export() -> None:
    exports = {"a": disk("a"), "bb": disk("bb", description="")}
    _, replies = negotiate(FIXED_NO_ZEROES + option(3), exports)
    assert replies == (
        reply(3, SERVER, bytes.fromhex("00000001") + b"a" + b"malloc disk")
        + reply(3, SERVER, bytes.fromhex("00000002") + b"bb")
        + reply(3, ACK)
    )


def test_list_of_nothing_is_acknowledged() -> None:
    _, replies = negotiate(FIXED_NO_ZEROES + option(3), {})
    assert replies == reply(3, ACK)


def test_list_with_data_is_invalid() -> None:
    _, replies = negotiate(FIXED_NO_ZEROES + option(3, b"x") + option(3))
    assert kinds(replies) == [INVALID, SERVER, ACK]


def test_list_cuts_no_client_off_for_a_name_that_is_not_utf_8() -> None:
    exports = {"d": disk("d", description="caf\udce9")}
    _, replies = negotiate(FIXED_NO_ZEROES + option(3), exports)
    assert replies == reply(3, SERVER, bytes.fromhex("00000001") + b"dcaf?") + reply(3, ACK)


# --- INFO and GO ---


@pytest.mark.parametrize("number", [6, 7])
def test_info_and_go_tell_size_flags_and_block_sizes(number: int) -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(number, info(b"disk")))
    assert replies == (
        reply(number, INFO, INFO_EXPORT) + reply(number, INFO, INFO_BLOCK_SIZE) + reply(number, ACK)
    )
    assert (handshake.export is not None) == (number == 7)


@pytest.mark.parametrize("number", [6, 7])
def test_info_and_go_tell_what_is_requested_and_ignore_unknown_requests(number: int) -> None:
    _, replies = negotiate(FIXED + option(number, info(b"disk", 3, 77, 2, 1, 0, 1)))
    assert replies == (
        reply(number, INFO, INFO_EXPORT)
        + reply(number, INFO, INFO_NAME)
        + reply(number, INFO, INFO_DESCRIPTION)
        + reply(number, INFO, INFO_BLOCK_SIZE)
        + reply(number, ACK)
    )


def test_go_never_pads_with_zeroes() -> None:
    _, with_zeroes = negotiate(FIXED + option(7, info(b"disk")))
    _, without = negotiate(FIXED_NO_ZEROES + option(7, info(b"disk")))
    assert with_zeroes == without


def test_go_follows_info() -> None:
    stream = FIXED_NO_ZEROES + option(6, info(b"disk")) + option(7, info(b"disk"))
    handshake, replies = negotiate(stream)
    assert kinds(replies) == [INFO, INFO, ACK, INFO, INFO, ACK]
    assert handshake.export is not None


@pytest.mark.parametrize("number", [6, 7])
def test_info_and_go_of_an_unknown_export_say_so(number: int) -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(number, info(b"tape")))
    assert replies == reply(number, UNKNOWN, b"no export is called 'tape'")
    assert handshake.export is None
    assert not handshake.finished


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(bytes(5), id="shorter than its fixed part"),
        pytest.param(bytes.fromhex("00000005") + b"disk" + bytes(2), id="name swallows the count"),
        pytest.param(bytes.fromhex("ffffffff") + b"disk" + bytes(2), id="name of 4 GiB"),
        pytest.param(info(b"disk", 3)[:-1], id="cut request"),
        pytest.param(info(b"disk", 3)[:-2], id="missing request"),
        pytest.param(info(b"disk", 3) + b"x", id="data behind the requests"),
        pytest.param(info(b"d" * 4097), id="name longer than a string may be"),
    ],
)
@pytest.mark.parametrize("number", [6, 7])
def test_malformed_info_and_go_are_invalid_and_stay_in_sync(number: int, data: bytes) -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(number, data) + option(2))
    assert kinds(replies) == [INVALID, ACK]
    assert handshake.export is None


def test_the_only_export_is_also_the_default_one() -> None:
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(7, info(b"", 1)))
    assert reply(7, INFO, INFO_NAME) in replies
    assert handshake.export is not None


def test_two_exports_have_no_default() -> None:
    exports = {"a": disk("a"), "b": disk("b")}
    _, replies = negotiate(FIXED_NO_ZEROES + option(7, info(b"")), exports)
    assert kinds(replies) == [UNKNOWN]


def test_a_name_that_is_not_utf_8_is_unknown() -> None:
    _, replies = negotiate(FIXED_NO_ZEROES + option(7, info(b"\xff\xfe")))
    assert kinds(replies) == [UNKNOWN]


def test_the_preferred_block_size_is_never_below_the_minimum() -> None:
    _, replies = negotiate(FIXED + option(6, info(b"disk")), {"disk": disk(block_size=65536)})
    assert bytes.fromhex("0003 00010000 00010000 02000000") in replies


def test_exports_may_come_and_go_during_the_session() -> None:
    exports = {"disk": disk()}
    handshake = Handshake(exports)
    assert kinds(handshake.receive(FIXED + option(6, info(b"disk")))) == [INFO, INFO, ACK]
    exports.clear()
    assert kinds(handshake.receive(option(6, info(b"disk")))) == [UNKNOWN]
    exports["new"] = disk("new")
    assert kinds(handshake.receive(option(7, info(b"new")))) == [INFO, INFO, ACK]
    assert handshake.export is exports["new"]


# --- everything else ---


@pytest.mark.parametrize("number", [0, 4, 5, 8, 9, 10, 11, 0xFFFFFFFF])
@pytest.mark.parametrize("length", [0, 1, 5000])
def test_an_option_that_is_not_supported_is_answered_in_sync(number: int, length: int) -> None:
    # Data that looks like an option must not be taken for one.
    data = (option(2) * (length // 16 + 1))[:length]
    handshake, replies = negotiate(FIXED_NO_ZEROES + option(number, data) + option(3))
    assert replies.startswith(reply(number, UNSUP))
    assert kinds(replies) == [UNSUP, SERVER, ACK]
    assert not handshake.finished


@pytest.mark.parametrize("number", [3, 6, 7])
def test_an_option_with_too_much_data_is_answered_in_sync(number: int) -> None:
    handshake = Handshake({"disk": disk()})
    stream = FIXED_NO_ZEROES + option(number, bytes(OPTION_DATA_MAX + 1)) + option(2)
    assert kinds(handshake.receive(stream)) == [TOO_BIG, ACK]
    assert handshake.finished


def test_the_largest_option_is_still_looked_at() -> None:
    handshake = Handshake({"disk": disk()})
    wanted = [3] * ((OPTION_DATA_MAX - 10) // 2)
    data = info(b"disk", *wanted)
    assert len(data) == OPTION_DATA_MAX
    assert kinds(handshake.receive(FIXED + option(7, data))) == [INFO, INFO, ACK]


def test_data_that_is_skipped_is_not_kept() -> None:
    handshake = Handshake({})
    handshake.receive(FIXED + b"IHAVEOPT" + bytes.fromhex("00000063 00100000"))
    for _ in range(OPTION_SKIP_MAX // 4096 - 1):
        assert handshake.receive(bytes(4096)) == b""
        assert len(handshake.trailing) < 4096
    assert kinds(handshake.receive(bytes(4096))) == [UNSUP]


def test_an_option_of_4_gib_drops_the_client_at_its_header() -> None:
    stream = FIXED + b"IHAVEOPT" + bytes.fromhex("00000063 ffffffff")
    assert refused(stream) == "option 99 with 4294967295 bytes of data"


@pytest.mark.parametrize("flags", ["00000004", "80000003", "ffffffff"])
def test_an_unknown_client_flag_drops_the_client(flags: str) -> None:
    assert "client flags" in refused(bytes.fromhex(flags))


@pytest.mark.parametrize("magic", [b"NBDMAGIC", b"GET / HT", bytes(8)])
def test_a_bad_option_magic_drops_the_client(magic: bytes) -> None:
    assert "magic" in refused(FIXED + magic + bytes(8))


def test_a_session_of_endless_options_is_dropped() -> None:
    handshake = Handshake({})
    handshake.receive(FIXED + option(99) * (OPTIONS_MAX - 1))
    with pytest.raises(ProtocolError, match="options"):
        handshake.receive(option(99))


def test_a_session_that_asks_for_endless_replies_is_dropped() -> None:
    handshake = Handshake({str(number): disk(str(number)) for number in range(1000)})
    with pytest.raises(ProtocolError, match="bytes of option replies"):
        handshake.receive(FIXED + option(3) * 100)


def test_a_dropped_session_answers_nothing_more() -> None:
    handshake = Handshake({"disk": disk()})
    with pytest.raises(ProtocolError):
        handshake.receive(bytes.fromhex("00000004"))
    assert handshake.receive(FIXED + option(7, info(b"disk"))) == b""
    assert handshake.export is None

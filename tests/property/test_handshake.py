"""Whatever arrives, and in whatever pieces, the handshake answers the same or drops the client."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from reactor.errors import ProtocolError
from reactor.protocol.client import Negotiation
from reactor.protocol.export import Export
from reactor.protocol.handshake import GREETING, OPTION_DATA_MAX, REPLIES_MAX, Handshake
from tests.unit.test_handshake import FIXED, FIXED_NO_ZEROES, disk, info, option

NAMES = st.sampled_from([b"disk", b"other", b"", b"tape", b"\xff"])
OPTIONS = st.one_of(
    st.builds(option, st.integers(0, 12), st.binary(max_size=40)),
    st.builds(
        lambda number, name, wanted: option(number, info(name, *wanted)),
        st.sampled_from([6, 7]),
        NAMES,
        st.lists(st.integers(0, 65535), max_size=4),
    ),
    st.builds(option, st.just(1), NAMES),
    st.binary(max_size=20),
)
SESSIONS = st.builds(
    lambda flags, options: flags + b"".join(options),
    st.sampled_from([FIXED, FIXED_NO_ZEROES, bytes(4), b"\xff\xff\xff\xff"]),
    st.lists(OPTIONS, max_size=6),
)
EXPORTS = {"disk": disk(), "other": disk("other", size=0, flags=0)}


def outcome(pieces: list[bytes]) -> tuple[bytes, Export | None, bool, bytes, str]:
    """What a session ends in; replies that a drop overtakes do not count."""
    handshake = Handshake(EXPORTS)
    replies = b""
    for piece in pieces:
        try:
            replies += handshake.receive(piece)
        except ProtocolError as error:
            return b"", None, False, b"", str(error)
        if handshake.export is None and not handshake.finished:
            assert len(handshake.trailing) < OPTION_DATA_MAX + 16
    assert len(replies) <= REPLIES_MAX
    return replies, handshake.export, handshake.finished, handshake.trailing, ""


@given(SESSIONS, st.data())
def test_any_fragmentation_has_the_same_outcome(session: bytes, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(session)), max_size=12)))
    pieces = [session[a:b] for a, b in zip([0, *cuts], [*cuts, len(session)], strict=True)]
    assert outcome(pieces) == outcome([session])


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_any_bytes_are_answered_or_drop_the_client(pieces: list[bytes]) -> None:
    outcome(pieces)


@given(st.lists(st.binary(max_size=80), max_size=8))
def test_any_bytes_after_the_client_flags_are_answered_or_drop_the_client(
    pieces: list[bytes],
) -> None:
    outcome([FIXED, *pieces])


@given(
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=128),
    description=st.text(max_size=300),
    size=st.integers(0, 2**64 - 1),
    block_size=st.sampled_from([1, 512, 4096, 65536]),
    flags=st.integers(0, 2**16 - 1),
    default=st.booleans(),
)
def test_our_client_learns_what_the_export_says(
    name: str, description: str, size: int, block_size: int, flags: int, default: bool
) -> None:
    export = Export(name, description, size, block_size, flags)
    server, client = Handshake({name: export}), Negotiation("" if default else name)
    to_client = GREETING
    while client.export is None:
        to_server = client.receive(to_client)
        to_client = server.receive(to_server) if to_server else b""
        assert to_client or client.export is not None
    assert server.export is export
    told = client.export
    assert (told.name, told.size, told.block_size) == (name, size, block_size)
    assert told.flags == flags | 1  # HAS_FLAGS
    assert told.description.encode() == description.encode(errors="replace")
    assert told.preferred_block_size == max(block_size, 4096)

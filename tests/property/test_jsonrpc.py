"""The RPC decoder: any cut of a stream gives the same values; any bytes give nothing worse."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from reactor.control.jsonrpc import INCOMPLETE, MESSAGE_MAX, Decoder, StreamError

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from(['"', "\\", "\\\\"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
MESSAGES = st.lists(VALUES, max_size=4) | st.dictionaries(st.text(), VALUES, max_size=4)
SPACES = st.text(" \t\r\n", max_size=3).map(str.encode)


def decode(pieces: list[bytes]) -> list[Any]:
    decoder = Decoder()
    values = []
    for piece in pieces:
        decoder.feed(piece)
        try:
            while (value := decoder.next()) is not INCOMPLETE:
                values.append(value)
        except StreamError:
            return [*values, StreamError]
        assert decoder.pending < MESSAGE_MAX
    return values


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[a:b] for a, b in pairwise(edges)]


@given(st.lists(st.tuples(MESSAGES, SPACES, st.booleans())), st.lists(st.integers(0, 1 << 16)))
def test_messages_come_out_whole_however_they_are_cut(
    messages: list[tuple[Any, bytes, bool]], places: list[int]
) -> None:
    stream = b"".join(
        json.dumps(value, ensure_ascii=ascii_only).encode(errors="surrogatepass") + space
        for value, space, ascii_only in messages
    )
    expected = [value for value, _, _ in messages]
    assert decode(cut(stream, places)) == expected
    assert decode([bytes([byte]) for byte in stream]) == expected


JSON_LIKE = st.lists(
    st.sampled_from(
        [
            *(bytes([c]) for c in b'{}[]",:\\ \n0-et'),
            b"true",
            b"nul",
            b'"a"',
            b"\\u",
            b"\xc3",
            b"1e9",
        ]
    ),
    max_size=40,
).map(b"".join)


@given(JSON_LIKE | st.binary(max_size=60), st.lists(st.integers(0, 100)))
def test_any_bytes_give_values_or_a_stream_error(stream: bytes, places: list[int]) -> None:
    whole = decode([stream])
    pieces = decode(cut(stream, places))
    # Only a scalar, which is no request anyway, may be seen earlier or later.
    containers = [v for v in whole if isinstance(v, dict | list)]
    assert [v for v in pieces if isinstance(v, dict | list)] == containers

"""The client's side of NBD: negotiation with GO, requests, simple replies. Bytes in, bytes out.

Source: doc/proto.md of NetworkBlockDevice/nbd.
"""

from __future__ import annotations

import struct
from typing import Final

from reactor.errors import ProtocolError, ReactorError
from reactor.protocol.export import Export
from reactor.protocol.steps import Parser, Steps
from reactor.protocol.wire import (
    CLIENT_FLAGS,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INFO_TYPE,
    MAX_PAYLOAD,
    NBD_CMD_DISC,
    NBD_CMD_READ,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_NO_ZEROES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_MAGIC,
    NBD_MAX_STRING,
    NBD_OPT_GO,
    NBD_OPTS_MAGIC,
    NBD_REP_ACK,
    NBD_REP_FLAG_ERROR,
    NBD_REP_INFO,
    NBD_REP_MAGIC,
    NBD_REQUEST_MAGIC,
    NBD_SIMPLE_REPLY_MAGIC,
    OPTION_HEADER,
    OPTION_REPLY,
    REQUEST,
    SERVER_GREETING,
    SIMPLE_REPLY,
    STRING_LENGTH,
)

REPLIES_MAX: Final = 64  # to one option
REPLY_DATA_MAX: Final = 64 << 10  # bytes
_WANTED: Final = (NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE)


class Negotiation:
    """Asks a server for the export `name` ("": its default); done when `export` is set.

    Then `trailing` are the bytes that belong to the transmission phase.
    """

    def __init__(self, name: str = "") -> None:
        self.export: Export | None = None
        self._name = name
        # Until the server says otherwise: a client may then use any offset and length.
        self._told = Export(name, "", size=0, block_size=1, flags=0)
        self._has_size = False
        self._to_send = bytearray()
        self._steps = Steps(self._negotiate())

    @property
    def trailing(self) -> bytes:
        """The bytes that came after the negotiation."""
        return self._steps.rest

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the server and return the bytes to send.

        Raises ReactorError when the server refuses, ProtocolError when it is none.
        """
        self._steps.feed(data)
        to_send, self._to_send = bytes(self._to_send), bytearray()
        return to_send

    def _negotiate(self) -> Parser:
        magic, style, flags = SERVER_GREETING.unpack((yield SERVER_GREETING.size))
        if magic != NBD_MAGIC:
            raise ProtocolError("the peer is not an NBD server")
        if style != NBD_OPTS_MAGIC or not flags & NBD_FLAG_FIXED_NEWSTYLE:
            raise ProtocolError("the server does not speak the fixed newstyle handshake")
        no_zeroes = NBD_FLAG_C_NO_ZEROES if flags & NBD_FLAG_NO_ZEROES else 0
        self._to_send += CLIENT_FLAGS.pack(NBD_FLAG_C_FIXED_NEWSTYLE | no_zeroes)
        self._to_send += _go(self._name)
        for _ in range(REPLIES_MAX):
            magic, option, reply, length = OPTION_REPLY.unpack((yield OPTION_REPLY.size))
            if magic != NBD_REP_MAGIC or option != NBD_OPT_GO or length > REPLY_DATA_MAX:
                raise ProtocolError("the server's answer is not an option reply to GO")
            self._take(reply, (yield length))
            if reply == NBD_REP_ACK:
                return
        raise ProtocolError(f"the server sent more than {REPLIES_MAX} replies to GO")

    def _take(self, reply: int, data: bytes) -> None:
        if reply == NBD_REP_INFO:
            try:
                self._take_information(data)
            except (struct.error, UnicodeDecodeError) as error:
                raise ProtocolError("the server sent malformed information") from error
        elif reply == NBD_REP_ACK:
            if not self._has_size:
                raise ProtocolError("the server did not say how large the export is")
            self.export = self._told
        elif reply & NBD_REP_FLAG_ERROR:
            why = data[:NBD_MAX_STRING].decode(errors="replace") or f"error {reply:#x}"
            raise ReactorError(f"the server refuses export {self._name!r}: {why}")
        else:
            raise ProtocolError(f"the server sent reply type {reply} to GO")

    def _take_information(self, data: bytes) -> None:
        told = self._told
        (kind,) = INFO_TYPE.unpack_from(data)
        if kind == NBD_INFO_EXPORT:
            _, told.size, told.flags = INFO_EXPORT.unpack(data)
            self._has_size = True
        elif kind == NBD_INFO_NAME:
            told.name = data[INFO_TYPE.size :].decode()
        elif kind == NBD_INFO_DESCRIPTION:
            told.description = data[INFO_TYPE.size :].decode()
        elif kind == NBD_INFO_BLOCK_SIZE:
            _, minimum, preferred, maximum = INFO_BLOCK_SIZE.unpack(data)
            if minimum.bit_count() != 1 or not minimum <= min(preferred, 65536) <= maximum:
                raise ProtocolError("the server sent impossible block sizes")
            told.block_size = minimum
            told.preferred_block_size = preferred
            told.maximum_payload = min(maximum, MAX_PAYLOAD)


class Transmission:
    """Packs requests and pairs the simple replies with them."""

    def __init__(self) -> None:
        self._expected: dict[int, int] = {}  # cookie: bytes of data that a success carries
        self._finished: list[tuple[int, int, bytes]] = []
        self._steps = Steps(self._parse())

    @property
    def outstanding(self) -> int:
        """How many requests wait for their reply."""
        return len(self._expected)

    def request(
        self, command: int, cookie: int, offset: int = 0, length: int = 0, *, flags: int = 0
    ) -> bytes:
        """Return a request's header; the payload of a write follows it.

        `cookie` is any 64-bit number that no outstanding request has.
        """
        assert cookie not in self._expected
        if command != NBD_CMD_DISC:
            self._expected[cookie] = length if command == NBD_CMD_READ else 0
        return REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)

    def receive(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """Return the requests that are finished now: (cookie, NBD error or 0, data of a read).

        Raises ProtocolError when the stream makes no sense any more.
        """
        self._steps.feed(data)
        finished, self._finished = self._finished, []
        return finished

    def _parse(self) -> Parser:
        while True:
            magic, error, cookie = SIMPLE_REPLY.unpack((yield SIMPLE_REPLY.size))
            if magic != NBD_SIMPLE_REPLY_MAGIC:
                raise ProtocolError(f"bad reply magic {magic:#010x}")
            length = self._expected.get(cookie)
            if length is None:
                raise ProtocolError(f"a reply to no request: cookie {cookie:#x}")
            data = yield 0 if error else length
            del self._expected[cookie]
            self._finished.append((cookie, error, data))


def _go(name: str) -> bytes:
    text = name.encode()
    data = STRING_LENGTH.pack(len(text)) + text + INFO_TYPE.pack(len(_WANTED))
    data += b"".join(INFO_TYPE.pack(kind) for kind in _WANTED)
    return OPTION_HEADER.pack(NBD_OPTS_MAGIC, NBD_OPT_GO, len(data)) + data

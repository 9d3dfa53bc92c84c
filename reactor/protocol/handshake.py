"""The server's side of the fixed-newstyle handshake: bytes in, bytes out.

Source: doc/proto.md of NetworkBlockDevice/nbd, "Handshake", "Option types".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Final

from reactor.errors import ProtocolError
from reactor.protocol.export import Export
from reactor.protocol.steps import Parser, Steps
from reactor.protocol.wire import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    INFO_TYPE,
    NBD_FLAG_C_FIXED_NEWSTYLE,
    NBD_FLAG_C_NO_ZEROES,
    NBD_FLAG_FIXED_NEWSTYLE,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_NO_ZEROES,
    NBD_INFO_BLOCK_SIZE,
    NBD_INFO_DESCRIPTION,
    NBD_INFO_EXPORT,
    NBD_INFO_NAME,
    NBD_MAGIC,
    NBD_MAX_STRING,
    NBD_OPT_ABORT,
    NBD_OPT_EXPORT_NAME,
    NBD_OPT_GO,
    NBD_OPT_INFO,
    NBD_OPT_LIST,
    NBD_OPTS_MAGIC,
    NBD_REP_ACK,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_TOO_BIG,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_UNSUP,
    NBD_REP_INFO,
    NBD_REP_MAGIC,
    NBD_REP_SERVER,
    OPTION_HEADER,
    OPTION_REPLY,
    SERVER_GREETING,
    STRING_LENGTH,
)

#: What a server says first.
GREETING: Final = SERVER_GREETING.pack(
    NBD_MAGIC, NBD_OPTS_MAGIC, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES
)

OPTIONS_MAX: Final = 1024  # a session; `qemu-nbd --list` asks INFO for every export in one
OPTION_DATA_MAX: Final = 64 << 10  # bytes of an option that are kept and looked at
OPTION_SKIP_MAX: Final = 1 << 20  # bytes of an option that are skipped to stay in sync
REPLIES_MAX: Final = 1 << 20  # bytes a session; the 16 bytes of a LIST ask for many
_SKIP_BYTES: Final = 4096  # at a time


class Handshake:
    """One client's negotiation for one of `exports`, which may come and go meanwhile.

    Send `GREETING`, then what `receive` returns. When `export` is set, transmission has begun;
    when `finished` is, the session ended without an export.
    """

    def __init__(self, exports: Mapping[str, Export]) -> None:
        self.export: Export | None = None
        self.finished = False
        self._exports = exports
        self._padding = b""
        self._replies = bytearray()
        self._replied_bytes = 0
        self._steps = Steps(self._negotiate())

    @property
    def trailing(self) -> bytes:
        """The bytes that came after the handshake: the first requests."""
        return self._steps.rest

    def receive(self, data: bytes) -> bytes:
        """Take bytes from the client and return the bytes to send.

        Raises ProtocolError when the client must be dropped, without a reply.
        """
        self._steps.feed(data)
        replies, self._replies = bytes(self._replies), bytearray()
        return replies

    def _negotiate(self) -> Parser:
        (flags,) = CLIENT_FLAGS.unpack((yield CLIENT_FLAGS.size))
        if flags & ~(NBD_FLAG_C_FIXED_NEWSTYLE | NBD_FLAG_C_NO_ZEROES):
            raise ProtocolError(f"unknown client flags {flags:#x}")
        if not flags & NBD_FLAG_C_NO_ZEROES:
            self._padding = bytes(124)
        for _ in range(OPTIONS_MAX):
            magic, option, length = OPTION_HEADER.unpack((yield OPTION_HEADER.size))
            if magic != NBD_OPTS_MAGIC:
                raise ProtocolError(f"bad option magic {magic:#018x}")
            if length > OPTION_SKIP_MAX:
                raise ProtocolError(f"option {option} with {length} bytes of data")
            answer = self._ANSWERS.get(option)
            if answer is not None and length <= OPTION_DATA_MAX:
                answer(self, option, (yield length))
            else:
                yield from _skip(length)
                self._refuse(option, length)
            if self.export is not None or self.finished:
                return
        raise ProtocolError(f"more than {OPTIONS_MAX} options")

    # --- the options ---

    def _export_name(self, _option: int, data: bytes) -> None:
        export = self._find(data)
        if export is None:  # this option knows no error reply
            raise ProtocolError(_unknown(data))
        self._send(EXPORT_NAME_REPLY.pack(export.size, _flags(export)) + self._padding)
        self.export = export

    def _abort(self, option: int, _data: bytes) -> None:
        self._reply(option, NBD_REP_ACK)
        self.finished = True

    def _list(self, option: int, data: bytes) -> None:
        if data:
            self._reply(option, NBD_REP_ERR_INVALID, b"LIST carries no data")
            return
        for export in self._exports.values():
            name = _text(export.name)
            length = STRING_LENGTH.pack(len(name))
            self._reply(option, NBD_REP_SERVER, length + name + _text(export.description))
        self._reply(option, NBD_REP_ACK)

    def _info(self, option: int, data: bytes) -> None:
        try:
            name, wanted = _parse_info(data)
        except ValueError as error:
            self._reply(option, NBD_REP_ERR_INVALID, str(error).encode())
            return
        export = self._find(name)
        if export is None:
            self._reply(option, NBD_REP_ERR_UNKNOWN, _unknown(name).encode())
            return
        for info in _information(export, wanted):
            self._reply(option, NBD_REP_INFO, info)
        self._reply(option, NBD_REP_ACK)
        if option == NBD_OPT_GO:
            self.export = export

    def _refuse(self, option: int, length: int) -> None:
        if option == NBD_OPT_EXPORT_NAME:  # this option knows no error reply
            raise ProtocolError(f"an export name of {length} bytes")
        if option in self._ANSWERS:
            self._reply(option, NBD_REP_ERR_TOO_BIG, b"too much data")
        else:
            self._reply(option, NBD_REP_ERR_UNSUP)

    _ANSWERS: ClassVar[Mapping[int, Callable[[Handshake, int, bytes], None]]] = {
        NBD_OPT_EXPORT_NAME: _export_name,
        NBD_OPT_ABORT: _abort,
        NBD_OPT_LIST: _list,
        NBD_OPT_INFO: _info,
        NBD_OPT_GO: _info,
    }

    # --- what they share ---

    def _find(self, name: bytes) -> Export | None:
        exports = self._exports
        if not name and len(exports) == 1:  # the only export is also the default one
            return next(iter(exports.values()))
        return exports.get(name.decode(errors="replace"))

    def _reply(self, option: int, reply: int, data: bytes = b"") -> None:
        self._send(OPTION_REPLY.pack(NBD_REP_MAGIC, option, reply, len(data)) + data)

    def _send(self, data: bytes) -> None:
        self._replied_bytes += len(data)
        if self._replied_bytes > REPLIES_MAX:
            raise ProtocolError(f"asked for more than {REPLIES_MAX} bytes of option replies")
        self._replies += data


def _skip(length: int) -> Parser:
    while length:
        piece = min(length, _SKIP_BYTES)
        yield piece
        length -= piece


def _parse_info(data: bytes) -> tuple[bytes, set[int]]:
    """Return the name and the information types of an INFO or GO; ValueError when malformed."""
    if len(data) < STRING_LENGTH.size + INFO_TYPE.size:
        raise ValueError("the option is too short")
    (length,) = STRING_LENGTH.unpack_from(data)
    types_at = STRING_LENGTH.size + length + INFO_TYPE.size
    if types_at > len(data):
        raise ValueError("the name is longer than the option")
    if length > NBD_MAX_STRING:
        raise ValueError(f"the name is longer than {NBD_MAX_STRING} bytes")
    (count,) = INFO_TYPE.unpack_from(data, types_at - INFO_TYPE.size)
    if len(data) != types_at + count * INFO_TYPE.size:
        raise ValueError("the count of information requests does not match the option's length")
    wanted = {wanted for (wanted,) in INFO_TYPE.iter_unpack(data[types_at:])}
    return data[STRING_LENGTH.size : STRING_LENGTH.size + length], wanted


def _information(export: Export, wanted: set[int]) -> list[bytes]:
    replies = [INFO_EXPORT.pack(NBD_INFO_EXPORT, export.size, _flags(export))]
    if NBD_INFO_NAME in wanted:
        replies.append(INFO_TYPE.pack(NBD_INFO_NAME) + _text(export.name))
    if NBD_INFO_DESCRIPTION in wanted:
        replies.append(INFO_TYPE.pack(NBD_INFO_DESCRIPTION) + _text(export.description))
    # Sent unasked too, as qemu does: the spec allows it, nbd-client obeys it without asking, and
    # a refusal (ERR_BLOCK_SIZE_REQD) would shut out clients whose requests are aligned anyway.
    minimum = export.block_size
    preferred = max(minimum, export.preferred_block_size)
    replies.append(
        INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, minimum, preferred, export.maximum_payload)
    )
    return replies


def _flags(export: Export) -> int:
    return export.flags | NBD_FLAG_HAS_FLAGS


def _text(text: str) -> bytes:
    # A file's name may carry bytes that are not UTF-8; the protocol's strings may not.
    return text.encode(errors="replace")[:NBD_MAX_STRING]


def _unknown(name: bytes) -> str:
    return f"no export is called {name.decode(errors='replace')[:64]!r}"

"""A client for the kernel's generic netlink: requests with an answer, deadlines, checked replies.

Source: include/uapi/linux/netlink.h and genetlink.h. Integers are in the host's byte order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from struct import Struct
from types import TracebackType
from typing import Final, Self, TypeAlias

from reactor.errors import DeviceError

NETLINK_GENERIC: Final = 16
SOL_NETLINK: Final = 270
NETLINK_CAP_ACK: Final = 10  # errors do not repeat the request

NLMSG_ERROR: Final = 2
NLM_F_REQUEST: Final = 1
NLM_F_ACK: Final = 4
NLA_F_NESTED: Final = 1 << 15
NLA_TYPE_MASK: Final = 0x3FFF

GENL_ID_CTRL: Final = 16
CTRL_CMD_GETFAMILY: Final = 3
CTRL_ATTR_FAMILY_ID: Final = 1
CTRL_ATTR_FAMILY_NAME: Final = 2

ANSWER_SECONDS: Final = 10.0
ANSWER_BYTES: Final = 1 << 16

HEADER: Final = Struct("=IHHII")  # length, type, flags, sequence, port
COMMAND: Final = Struct("=BBH")  # command, version, reserved
ATTRIBUTE: Final = Struct("=HH")  # length, type
ERROR: Final = Struct("=i")
U16: Final = Struct("=H")
U32: Final = Struct("=I")
U64: Final = Struct("=Q")

#: The payloads by attribute type; of a type that comes twice, the last.
Attributes: TypeAlias = Mapping[int, bytes]


class Malformed(Exception):
    """An answer that is not netlink."""


def attribute(kind: int, payload: bytes) -> bytes:
    """Return one attribute, padded."""
    length = ATTRIBUTE.size + len(payload)
    return ATTRIBUTE.pack(length, kind) + payload + bytes(-length % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds `attributes`."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def parse_attributes(data: bytes) -> dict[int, bytes]:
    """Return the attributes in `data`; raises Malformed."""
    found = {}
    position = 0
    while position < len(data):
        length, kind = _unpack(ATTRIBUTE, data, position)
        if length < ATTRIBUTE.size or position + length > len(data):
            raise Malformed("an attribute has an impossible length")
        found[kind & NLA_TYPE_MASK] = data[position + ATTRIBUTE.size : position + length]
        position += length + -length % 4
    return found


def parse_messages(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield (type, sequence, payload) of each message in `data`; raises Malformed."""
    position = 0
    while position < len(data):
        length, kind, _flags, sequence, _port = _unpack(HEADER, data, position)
        if length < HEADER.size or position + length > len(data):
            raise Malformed("a message has an impossible length")
        yield kind, sequence, data[position + HEADER.size : position + length]
        position += length + -length % 4


def parse_number(form: Struct, payload: bytes | None) -> int:
    """Return the integer in an attribute; raises Malformed when it is absent or of another size."""
    if payload is None or len(payload) != form.size:
        raise Malformed("a number is missing or has another size")
    return int(form.unpack(payload)[0])


def _unpack(form: Struct, data: bytes, position: int) -> tuple[int, ...]:
    try:
        return form.unpack_from(data, position)
    except struct.error as error:
        raise Malformed("it ends too early") from error


class Family:
    """A socket to one generic netlink family.

    Raises OSError with the kernel's errno (ENOENT: it has no such family), DeviceError EPROTO for
    an answer that makes no sense and ETIMEDOUT for none.
    """

    def __init__(self, name: str) -> None:
        self._sequence = 0
        self._socket = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_GENERIC
        )
        try:
            self._socket.bind((0, 0))
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
            wanted = attribute(CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
            answer = self._ask(GENL_ID_CTRL, CTRL_CMD_GETFAMILY, wanted)
            self._id = _checked(U16, answer, CTRL_ATTR_FAMILY_ID)
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def ask(self, command: int, *attributes: bytes) -> Attributes:
        """Send a command and return the attributes of its answer, once it is acknowledged.

        The kernel executes the command inside the sending system call: that has no deadline.
        """
        return self._ask(self._id, command, b"".join(attributes))

    def ask_number(self, form: Struct, kind: int, command: int, *attributes: bytes) -> int:
        """Send a command and return one number of its answer."""
        return _checked(form, self.ask(command, *attributes), kind)

    def _ask(self, family: int, command: int, attributes: bytes) -> Attributes:
        self._sequence += 1
        payload = COMMAND.pack(command, 1, 0) + attributes
        length = HEADER.size + len(payload)
        flags = NLM_F_REQUEST | NLM_F_ACK
        self._socket.sendto(HEADER.pack(length, family, flags, self._sequence, 0) + payload, (0, 0))
        try:
            return self._answer(family)
        except Malformed as error:
            raise _nonsense(error) from error

    def _answer(self, family: int) -> Attributes:
        answer: Attributes = {}
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            for kind, payload in self._receive(deadline):
                if kind == NLMSG_ERROR:
                    number = -parse_number(ERROR, payload[: ERROR.size])
                    if number:
                        raise OSError(number, os.strerror(number))
                    return answer
                if kind == family:
                    answer = parse_attributes(payload[COMMAND.size :])

    def _receive(self, deadline: float) -> list[tuple[int, bytes]]:
        """Return the messages of one datagram that answer the last request."""
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise _silence()
        self._socket.settimeout(seconds)
        try:
            data, _, flags, (port, _) = self._socket.recvmsg(ANSWER_BYTES)
        except TimeoutError as error:
            raise _silence() from error
        if port != 0:  # any process may send to this socket; only port 0 is the kernel
            return []
        if flags & socket.MSG_TRUNC:
            raise Malformed(f"it is longer than {ANSWER_BYTES} bytes")
        messages = parse_messages(data)
        return [(kind, payload) for kind, number, payload in messages if number == self._sequence]


def _checked(form: Struct, answer: Attributes, kind: int) -> int:
    try:
        return parse_number(form, answer.get(kind))
    except Malformed as error:
        raise _nonsense(error) from error


def _nonsense(error: Malformed) -> DeviceError:
    return DeviceError(errno.EPROTO, f"the kernel's netlink answer makes no sense: {error}")


def _silence() -> DeviceError:
    return DeviceError(errno.ETIMEDOUT, f"the kernel did not answer within {ANSWER_SECONDS:g} s")

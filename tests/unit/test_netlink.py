"""The generic netlink client: its bytes, the kernel's answers, and answers that are none."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reactor.attach import genetlink, netlink, sysfs
from reactor.attach.genetlink import (
    HEADER,
    NLMSG_ERROR,
    U16,
    U32,
    Family,
    Malformed,
    attribute,
    nested,
    parse_attributes,
    parse_messages,
    parse_number,
)
from reactor.attach.netlink import NBD_CMD_DISCONNECT, NetlinkDevice
from reactor.errors import DeviceError

CONTROLLER = "nlctrl"  # the family that every kernel has


@pytest.fixture
def family() -> Iterator[Family]:
    with Family(CONTROLLER) as family:
        yield family


def ask_for(family: Family, name: str) -> int:
    wanted = attribute(genetlink.CTRL_ATTR_FAMILY_NAME, name.encode() + b"\0")
    return family.ask_number(
        U16, genetlink.CTRL_ATTR_FAMILY_ID, genetlink.CTRL_CMD_GETFAMILY, wanted
    )


def test_an_attribute_is_padded_to_four_bytes_but_keeps_its_length() -> None:
    assert attribute(10, b"id\0") == bytes.fromhex("07000a0069640000")


def test_nesting_marks_the_outer_attribute() -> None:
    assert nested(7, attribute(1, b"\1\0\0\0")) == bytes.fromhex("0c000780080001000100 0000")


def test_sockets_are_items_of_one_descriptor_each() -> None:
    left, right = socket.socketpair()
    with left, right:
        encoded = netlink._sockets([left, right])
        items = parse_attributes(encoded)[netlink.NBD_ATTR_SOCKETS]
        expected = b"".join(
            bytes.fromhex("0c000180 08000100") + U32.pack(end.fileno()) for end in (left, right)
        )
        assert items == expected


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=64)))
def test_what_is_encoded_is_parsed(values: dict[int, bytes]) -> None:
    data = b"".join(attribute(kind, payload) for kind, payload in values.items())
    assert parse_attributes(data) == values


@given(st.binary(max_size=200))
def test_any_bytes_are_attributes_or_malformed(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        parse_attributes(data)


@given(st.binary(max_size=200))
def test_any_bytes_are_messages_or_malformed(data: bytes) -> None:
    with contextlib.suppress(Malformed):
        list(parse_messages(data))


@pytest.mark.parametrize("length", [0, 3, 9])
def test_an_attribute_of_impossible_length_is_malformed(length: int) -> None:
    with pytest.raises(Malformed):
        parse_attributes(genetlink.ATTRIBUTE.pack(length, 1) + bytes(4))


@pytest.mark.parametrize("length", [0, 15, 25])
def test_a_message_of_impossible_length_is_malformed(length: int) -> None:
    with pytest.raises(Malformed):
        list(parse_messages(HEADER.pack(length, 16, 0, 1, 0) + bytes(8)))


@pytest.mark.parametrize("payload", [None, b"", b"\1\0", b"\1\0\0\0\0\0\0\0"])
def test_a_number_of_another_size_is_malformed(payload: bytes | None) -> None:
    with pytest.raises(Malformed):
        parse_number(U32, payload)


def test_the_kernel_answers(family: Family) -> None:
    assert ask_for(family, CONTROLLER) == genetlink.GENL_ID_CTRL


def test_a_family_that_the_kernel_lacks_is_enoent() -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        Family("no-such-family")
    assert caught.value.errno == errno.ENOENT


def test_the_kernels_refusal_keeps_its_errno_and_the_socket_works_on(family: Family) -> None:
    with pytest.raises(OSError, match="Operation not supported") as caught:
        family.ask(255)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert ask_for(family, CONTROLLER) == genetlink.GENL_ID_CTRL


def test_an_answer_without_the_number_is_a_clear_error(family: Family) -> None:
    wanted = attribute(genetlink.CTRL_ATTR_FAMILY_NAME, CONTROLLER.encode() + b"\0")
    with pytest.raises(DeviceError, match="netlink answer makes no sense") as caught:
        family.ask_number(U32, 0x3FF0, genetlink.CTRL_CMD_GETFAMILY, wanted)
    assert caught.value.errno == errno.EPROTO


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may send to another's netlink socket")
def test_answers_of_other_processes_are_not_the_kernels(family: Family) -> None:
    port = family._socket.getsockname()[0]
    forged = HEADER.pack(20, NLMSG_ERROR, 0, family._sequence + 1, 0) + (-errno.EIO).to_bytes(
        4, "little", signed=True
    )
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, genetlink.NETLINK_GENERIC) as forger:
        forger.bind((0, 0))
        for data in (forged, b"garbage"):
            forger.sendto(data, (port, 0))
    assert ask_for(family, CONTROLLER) == genetlink.GENL_ID_CTRL


def test_silence_ends_at_the_deadline(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(genetlink, "ANSWER_SECONDS", 0.01)
    with pytest.raises(DeviceError, match="did not answer") as caught:
        family._answer(genetlink.GENL_ID_CTRL)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_detach_that_is_tried_again_leaves_the_next_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    holders: list[int | OSError] = [111, 111, OSError(errno.EMFILE, os.strerror(errno.EMFILE))]
    asked: list[int] = []

    def pid(_index: int) -> int:
        holder = holders.pop(0) if holders else 222
        if isinstance(holder, OSError):
            raise holder
        return holder

    monkeypatch.setattr(sysfs, "pid", pid)
    monkeypatch.setattr(sysfs, "backend", lambda _index: "tag")
    monkeypatch.setattr(sysfs, "announce", lambda _index: None)
    monkeypatch.setattr(
        NetlinkDevice, "_ask", lambda _self, _failed, command: asked.append(command)
    )
    device = NetlinkDevice(0, "tag")
    with pytest.raises(OSError, match="Too many open files"):
        device.detach()
    device.detach()
    assert asked == [NBD_CMD_DISCONNECT]

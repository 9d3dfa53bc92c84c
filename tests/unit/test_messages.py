"""What comes over the control bus is checked before anybody acts on it."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from reactor.errors import BusError
from reactor.messages import EVENTS, MESSAGE_MAX, REPORT, VERSION, decode, encode
from reactor.spec import DiskSpec

PLAIN: dict[type, Any] = {dict: {}, bool: False, list: [], int: 1, str: ""}
SPEC = DiskSpec("a", "null", {"size": 512}).to_message()
DISK = {**{name: PLAIN[kind] for name, kind in REPORT.items()}, "spec": SPEC}


def hello(*disks: object) -> bytes:
    return encode("hello", id=0, core=0, pid=1, disks=disks)


def test_a_hello_is_read() -> None:
    assert decode(hello(DISK, DISK), EVENTS)["disks"] == [DISK, DISK]


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        (b"", "not msgpack"),
        (b"\xc1", "not msgpack"),
        (b"\x90", "not of version"),
        (msgpack.packb({"v": VERSION + 1, "type": "hello"}), "not of version"),
        (msgpack.packb({"v": VERSION}), "unknown type None"),
        (msgpack.packb({"v": VERSION, "type": {}}), "unknown type {}"),
        (encode("stopped", id=1), "stopped: disk is missing or not str"),
        (encode("stopped", id=True, disk="a"), "stopped: id is missing or not int"),
        (hello("disk"), "hello, a disk: it is no map"),
        (hello(DISK, {**DISK, "shared": 1}), "hello, a disk: shared is missing or not bool"),
        (hello({**DISK, "size": None}), "hello, a disk: size is missing or not int"),
        (hello({**DISK, "spec": {}}), "its spec: name is missing or not str"),
        (hello({**DISK, "spec": {**SPEC, "name": []}}), "its spec: name is missing or not str"),
        (hello({**DISK, "spec": {**SPEC, "options": []}}), "options is missing or not dict"),
        (hello({**DISK, "spec": {**SPEC, "listen": 1}}), "hello, a disk: its spec: "),
        (hello({**DISK, "spec": {**SPEC, "listen": [1]}}), "hello, a disk: its spec: "),
        (hello({**DISK, "spec": {**SPEC, "of_tomorrow": 1}}), "hello, a disk: its spec: "),
        (b"\0" * (MESSAGE_MAX + 1), "more than"),
    ],
)
def test_what_is_no_event_is_refused(frame: bytes, problem: str) -> None:
    with pytest.raises(BusError, match=problem):
        decode(frame, EVENTS)

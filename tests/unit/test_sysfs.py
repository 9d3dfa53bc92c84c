"""What /sys says: "not there" is an answer, "it cannot be read now" is none."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from reactor.attach import device, occupants, sysfs
from reactor.attach.netlink import NetlinkDevice

TAG = "nbd-reactor:0000:x"
MOUNTED = ["/dev/nbd7 /mnt ext4 rw 0 0", "/dev/nbd77 /other ext4 rw 0 0"]


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host with one device that carries a file system."""
    monkeypatch.setattr(sysfs, "BLOCK", tmp_path / "block")
    monkeypatch.setattr(occupants, "PROC", tmp_path / "proc")
    for name, text in {
        "block/nbd7/pid": "1\n",
        "block/nbd7/backend": f"{TAG}\n",
        "block/nbd7/size": "2048\n",
        "block/nbd7/holders/dm-0": "",
        "block/nbd7/nbd7p1/holders/dm-1": "",
        "block/nbd77/holders/dm-2": "",
        "block/loop0/size": "0\n",
        "block/loop1/loop/backing_file": "/dev/nbd7\n",
        "block/loop2/loop/backing_file": "/dev/nbd7p1\n",
        "block/loop3/loop/backing_file": "/dev/nbd77\n",
        "proc/self/mounts": "\n".join(MOUNTED),
        "proc/swaps": "Filename Type\n/dev/nbd7p2 partition\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@contextmanager
def failing(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        for name in ("read_bytes", "read_text", "iterdir"):
            patch.setattr(Path, name, fail)
        yield


QUESTIONS: list[Callable[[], object]] = [
    sysfs.indexes,
    lambda: sysfs.pid(7),
    lambda: sysfs.backend(7),
    lambda: sysfs.size(7),
    lambda: sysfs.holders(7),
    lambda: sysfs.is_free(7),
    lambda: occupants.claims("/dev/nbd7", 7),
    lambda: device.held("nbd-reactor:"),
    lambda: device.adopt(TAG),
    NetlinkDevice(7, TAG)._check_ours,
]


@pytest.mark.parametrize("ask", QUESTIONS)
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
def test_what_cannot_be_known_is_no_answer(
    ask: Callable[[], object], number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        failing(number, monkeypatch),
        pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught,
    ):
        ask()
    assert caught.value.errno == number


@pytest.mark.parametrize("number", sysfs.ABSENT)
def test_what_is_not_there_is_one(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(number, monkeypatch):
        assert sysfs.indexes() == []
        assert sysfs.pid(7) is None
        assert sysfs.is_free(7)
        assert occupants.claims("/dev/nbd7", 7) == []


def test_that_it_is_in_use_is_said_only_when_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(errno.EMFILE, monkeypatch), pytest.raises(OSError, match="Too many open files"):
        device.claims("/dev/nbd7", 0.0)


@pytest.mark.parametrize(
    ("number", "claims"),
    [(errno.EBUSY, ["somebody"]), (errno.ENXIO, []), (errno.ETIMEDOUT, None), (errno.ENOMEM, None)],
)
def test_the_kernel_has_the_last_word_on_claims(
    number: int, claims: list[str] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(device.DEVICE_IO, "await_start", lambda: None)
    monkeypatch.setattr(device.DEVICE_IO, "ask", answer)
    if claims is not None:
        assert device.claims("/dev/nbd777", 0.0) == claims
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        device.claims("/dev/nbd777", 0.0)


def test_claims_are_of_the_device_and_its_partitions() -> None:
    claims = ["the mount /mnt", "the swap on /dev/nbd7p2", "/dev/dm-0", "/dev/dm-1"]
    claims += ["/dev/loop1", "/dev/loop2"]
    assert occupants.claims("/dev/nbd7", 7) == claims
    assert occupants.claims("/dev/nbd77", 77) == ["the mount /other", "/dev/dm-2", "/dev/loop3"]
    assert sysfs.indexes() == [7, 77]

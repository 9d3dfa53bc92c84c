"""A file disk does what a bytearray does, in every way that it does I/O."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backends.threads import Threads
from backends.uring import Ring
from reactor.protocol.wire import (
    NBD_CMD_CACHE,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
)
from tests.unit.file_disks import Opened

BLOCK = 512
BLOCKS = 256

Step = tuple[int, int, int, int, int]  # command, flags, first block, blocks, fill byte

steps = st.tuples(
    st.sampled_from(
        [
            NBD_CMD_READ,
            NBD_CMD_READ,
            NBD_CMD_WRITE,
            NBD_CMD_WRITE,
            NBD_CMD_FLUSH,
            NBD_CMD_TRIM,
            NBD_CMD_CACHE,
            NBD_CMD_WRITE_ZEROES,
        ]
    ),
    st.sampled_from([0, 0, NBD_CMD_FLAG_FUA, NBD_CMD_FLAG_NO_HOLE]),
    st.integers(0, BLOCKS - 1),
    st.integers(1, BLOCKS),
    st.integers(1, 255),
)


def _apart(batch: list[Step]) -> list[Step]:
    taken: set[int] = set()
    apart = []
    for command, flags, first, count, fill in batch:
        last = min(first + count, BLOCKS)
        blocks = set(range(first, last))
        if command == NBD_CMD_FLUSH or not blocks & taken:
            taken |= blocks
            apart.append((command, flags, first, last - first, fill))
    return apart


# What is submitted together must not overlap: the protocol gives it no order.
batches = st.lists(st.lists(steps, max_size=12).map(_apart), max_size=8)


@pytest.mark.parametrize(
    "way",
    [
        {"engine": Ring},
        {"engine": Ring, "direct": True},
        {"engine": Threads},
        {"engine": Threads, "direct": True},
    ],
    ids=["buffered", "direct", "buffered-threads", "direct-threads"],
)
@settings(max_examples=30)
@given(batches=batches)
def test_a_disk_is_a_bytearray(batches: list[list[Step]], way: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        disk = Opened(Path(folder, "image"), size=BLOCKS * BLOCK, **way)
        try:
            model = bytearray(BLOCKS * BLOCK)
            for batch in batches:
                _run(disk, model, batch)
            assert disk.requester.read(0, len(model)) == model
            assert disk.path.read_bytes() == model
        finally:
            disk.close()


def _run(disk: Opened, model: bytearray, batch: list[Step]) -> None:
    expected = {}
    for command, flags, first, count, fill in batch:
        start, end = first * BLOCK, (first + count) * BLOCK
        payload = bytes([fill]) * (end - start) if command == NBD_CMD_WRITE else b""
        cookie = disk.requester.submit(command, start, end - start, payload, flags)
        expected[cookie] = (0, bytes(model[start:end]) if command == NBD_CMD_READ else b"")
        if command == NBD_CMD_WRITE:
            model[start:end] = payload
        elif command in (NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES):
            model[start:end] = bytes(end - start)
    disk.requester.wait()
    assert {cookie: disk.requester.answers[cookie] for cookie in expected} == expected

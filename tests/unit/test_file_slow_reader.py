"""Clients of one file disk, of which one does not read what it asked for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backends.buffers import POOL_BYTES_MAX
from backends.threads import Threads
from backends.uring import Ring
from tests.submitting import turn_until
from tests.unit.file_disks import MIB, Client, Open, Opened, opening
from tests.unit.requests import reply


@pytest.fixture
def opened() -> Iterator[Open]:
    yield from opening()


DIRECT = [(Ring, True), (Threads, True)]


@pytest.fixture(params=[*DIRECT, (Ring, False)])
def disk(request: pytest.FixtureRequest, tmp_path: Path, opened: Open) -> Opened:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(MIB) * 66)
    with path.open("r+b") as file:
        for block in range(66):  # no two are the same
            file.seek(block * MIB + 512 * block)
            file.write(os.urandom(512))
    engine, direct = request.param
    return opened(path, engine=engine, direct=direct)


def answer(disk: Opened, cookie: int, offset: int, length: int) -> bytes:
    with disk.path.open("rb") as file:
        file.seek(offset)
        return reply(cookie, 0, file.read(length))


ALL_OF_IT = ((0, 31 * MIB), (32 * MIB, 32 * MIB))  # two buffers of 32 MiB


def expect_everything(disk: Opened, slow: Client) -> None:
    """Let the slow client read at last; its answers may come in any order."""
    received = slow.answers(16 + 31 * MIB + 16 + 32 * MIB)
    parts = [answer(disk, cookie, *read) for cookie, read in enumerate(ALL_OF_IT)]
    assert received in (parts[0] + parts[1], parts[1] + parts[0])


def expect_all_buffers_back(disk: Opened) -> None:
    pool = disk.channel._pool
    assert pool.total_bytes == pool.free_bytes


@pytest.mark.parametrize("disk", DIRECT, indirect=True)
def test_a_client_that_does_not_read_keeps_no_other_waiting(disk: Opened) -> None:
    slow, neighbour = Client(disk), Client(disk)
    slow.ask(*ALL_OF_IT)
    turn_until(disk.reactor, lambda: slow.connection.counters.reads == 2)
    turn_until(disk.reactor, lambda: slow.connection._blocked)
    assert disk.channel._pool.total_bytes == POOL_BYTES_MAX  # lent while nobody needs it
    for offset in (64 * MIB, 0, 65 * MIB):
        neighbour.ask((offset, MIB))
        assert neighbour.answers(16 + MIB) == answer(disk, 0, offset, MIB)
    expect_all_buffers_back(disk)
    expect_everything(disk, slow)
    expect_all_buffers_back(disk)
    slow.end()
    neighbour.end()


@pytest.mark.parametrize("disk", DIRECT, indirect=True)
def test_nor_those_who_were_refused_before_it_was_known(disk: Opened) -> None:
    slow, neighbour = Client(disk), Client(disk)
    slow.ask(*ALL_OF_IT)
    turn_until(disk.reactor, lambda: slow.connection._in_flight == 2)
    neighbour.ask((64 * MIB, MIB))
    turn_until(disk.reactor, lambda: neighbour.connection._busy)
    assert neighbour.answers(16 + MIB) == answer(disk, 0, 64 * MIB, MIB)
    expect_everything(disk, slow)
    expect_all_buffers_back(disk)
    slow.end()
    neighbour.end()


def test_many_that_do_not_read_keep_no_other_waiting_and_may_vanish(disk: Opened) -> None:
    slow, neighbour = [Client(disk) for _ in range(4)], Client(disk)
    for client in slow:
        client.ask(*ALL_OF_IT)
    turn_until(disk.reactor, lambda: all(one.connection.counters.reads for one in slow))
    neighbour.ask((64 * MIB, MIB))
    assert neighbour.answers(16 + MIB) == answer(disk, 0, 64 * MIB, MIB)
    expect_everything(disk, slow[-1])
    for client in slow:
        client.end()
    expect_all_buffers_back(disk)
    neighbour.end()

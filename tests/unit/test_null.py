"""The disk without storage."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from backends import registry
from backends.api import Disk
from backends.null import BACKEND, DEFAULT_SIZE
from reactor.loop import Reactor
from reactor.protocol.wire import MAX_PAYLOAD
from tests.unit.pumping import Pump
from tests.unit.requests import export, request

READ, WRITE, _, FLUSH, TRIM, CACHE, ZEROES = range(7)


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    made = Reactor()
    yield made
    made.close()


def create(reactor: Reactor, block_size: int | None = None, **options: object) -> Disk:
    return BACKEND.create(
        "disk",
        options,
        instance="test",
        reactor=reactor,
        block_size=block_size,
        readonly=False,
        shared=False,
    )


def test_it_is_found_by_its_name() -> None:
    assert registry.backend("null") is BACKEND


def test_its_size_may_be_left_out(reactor: Reactor) -> None:
    assert create(reactor).size == DEFAULT_SIZE
    assert create(reactor, size=4096, block_size=4096).size == 4096


@pytest.mark.parametrize(("size", "block_size"), [(0, 512), (-512, 512), (1000, 512), (512, 4096)])
def test_an_impossible_size_is_refused(reactor: Reactor, size: int, block_size: int) -> None:
    with pytest.raises(OSError, match="multiple of the block size") as raised:
        create(reactor, size=size, block_size=block_size)
    assert raised.value.errno == errno.EINVAL


def test_it_takes_everything_and_reads_zeroes(reactor: Reactor) -> None:
    disk = create(reactor, size=64 << 20)
    with Pump(disk=disk, export=export(size=64 << 20)) as pump:
        stream = (
            request(WRITE, 0, cookie=1, payload=b"x" * 4096)
            + request(FLUSH, cookie=2)
            + request(TRIM, 0, 64 << 20, cookie=3)
            + request(ZEROES, 0, 64 << 20, cookie=4)
            + request(CACHE, 0, 64 << 20, cookie=5)
            + request(READ, 0, 4096, cookie=6)
        )
        assert pump.ask(stream, _6=4096) == [
            *((cookie, 0, b"") for cookie in range(1, 6)),
            (6, 0, bytes(4096)),
        ]


def test_the_largest_read_is_served(reactor: Reactor) -> None:
    disk = create(reactor, size=64 << 20)
    with Pump(disk=disk, export=export(size=64 << 20)) as pump:
        pump.send(request(READ, 0, MAX_PAYLOAD))
        assert not any(pump.receive(16 + MAX_PAYLOAD)[16:])


def test_it_changes_its_size(reactor: Reactor) -> None:
    disk = create(reactor, size=4096)
    disk.resize(8192)
    assert disk.size == 8192

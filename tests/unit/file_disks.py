"""Disks of the file backend, opened for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from backends.api import Event
from backends.engine import Engine
from backends.file import FileBackend, FileDisk
from backends.filechannel import FileChannel, open_engine
from reactor.errors import reason
from reactor.loop import Reactor
from tests.submitting import Requester, turn_until

MIB = 1 << 20


class Opened:
    """A disk with a channel and a requester."""

    def __init__(
        self,
        path: Path,
        *,
        engine: Callable[..., Engine] = open_engine,
        block_size: int | None = None,
        readonly: bool = False,
        shared: bool = False,
        name: str = "disk",
        keep_lent: bool = False,
        **options: object,
    ) -> None:
        self.path = path
        self.reactor = Reactor("interrupt")
        self.events: list[tuple[Event, str]] = []
        try:
            disk = FileBackend.create(
                name,
                {"path": str(path), **options},
                instance="test",
                reactor=self.reactor,
                block_size=block_size,
                readonly=readonly,
                shared=shared,
            )
        except BaseException:
            self.reactor.close()
            raise
        assert isinstance(disk, FileDisk)
        self.disk = disk
        self.descriptor = disk.open(lambda *event: self.events.append(event), write=not readonly)
        self.channel = FileChannel(disk, self.reactor, engine)
        self.requester = Requester(self.reactor, self.channel, keep_lent=keep_lent)

    def close(self) -> None:
        self.channel.close()
        self.descriptor.close()
        self.disk.close()
        self.reactor.close()

    def removal(self) -> str:
        turn_until(self.reactor, lambda: self.events)
        ((event, text),) = self.events
        assert event is Event.REMOVE
        return text


Open = Callable[..., Opened]


def opening() -> Iterator[Open]:
    """Yield a function that opens disks, then close them all."""
    everything: list[Opened] = []

    def open_one(path: Path, **options: object) -> Opened:
        everything.append(Opened(path, **options))  # type: ignore[arg-type]
        return everything[-1]

    yield open_one
    for one in everything:
        one.close()


def problem(opened: Open, path: Path, **options: object) -> tuple[int | None, str]:
    """Open what cannot be opened; returns the errno and what the operator is told."""
    with pytest.raises(OSError) as raised:  # noqa: PT011
        opened(path, **options)
    text = reason(raised.value)
    assert text.startswith(f"{path}: ")
    return raised.value.errno, text.removeprefix(f"{path}: ")

"""The `service` fixture: the real `nbd-reactor` as a process of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.running import RunningService


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Callable[..., RunningService]]:
    """A factory of running services; each is stopped, and must stop cleanly, at the end."""
    started: list[RunningService] = []

    def start(config: str | None = None, *arguments: str, **settings: object) -> RunningService:
        running = RunningService(tmp_path / f"s{len(started)}", config, *arguments, **settings)
        started.append(running)
        return running

    yield start
    for running in reversed(started):
        running.stop()

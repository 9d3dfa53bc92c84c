"""What tests that tell what happens have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.simulation.hosts import Hosts

SEEDS = range(20)


@pytest.fixture(params=SEEDS)
def hosts(request: pytest.FixtureRequest) -> Iterator[Hosts]:
    """Hosts that differ in when things happen."""
    made = Hosts(request.param)
    yield made
    if made.service.platform is not None:
        made.service.platform.reactor.close()

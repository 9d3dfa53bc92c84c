"""The machine that these tests run against; tools/machine boots one for the whole run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.machine.machine import Machine

FOLDER = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder, and skip them where there is no machine."""
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.machine)
            item.add_marker(pytest.mark.timeout(600))
            if "MACHINE_SSH" not in os.environ:
                item.add_marker(pytest.mark.skip(reason="needs a machine: run it in tools/machine"))


@pytest.fixture(scope="session")
def machine() -> Machine:
    """The machine, booted."""
    return Machine(Path(os.environ["MACHINE_SSH"]), Path(os.environ["MACHINE_CONSOLE"]))

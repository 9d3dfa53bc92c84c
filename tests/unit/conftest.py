"""What the tests of disks.yaml share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import pytest

from reactor.config import ConfigError, load
from reactor.spec import DiskSpec
from tests.unit.config_schemas import CORES, SCHEMAS

Load = Callable[[str], tuple[DiskSpec, ...]]
Problems = Callable[[str], list[str]]


@pytest.fixture
def config(tmp_path: Path) -> Load:
    """Load the text, whose first line is empty, as a file."""

    def loaded(text: str) -> tuple[DiskSpec, ...]:
        path = tmp_path / "disks.yaml"
        path.write_text(dedent(text).removeprefix("\n"))
        return load(path, SCHEMAS, CORES)

    return loaded


@pytest.fixture
def problems(config: Load, tmp_path: Path) -> Problems:
    """Return the problems of the text as `LINE: PROBLEM`."""

    def found(text: str) -> list[str]:
        with pytest.raises(ConfigError) as raised:
            config(text)
        assert str(raised.value).splitlines() == list(raised.value.problems)
        return [line.removeprefix(f"{tmp_path}/disks.yaml:") for line in raised.value.problems]

    return found

"""What the operators' pages say of the units is what the units say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
UNITS = [path.read_text().splitlines() for path in (DEPLOY / "systemd").glob("*.service")]
SETTING = re.compile(r"`((?:KillMode|Restart|RestartKillSignal|WatchdogSec|Type)=[\w-]+)`")


@pytest.mark.parametrize("page", sorted(DEPLOY.glob("*.md")), ids=lambda page: page.name)
def test_what_is_said_of_the_units_is_so(page: Path) -> None:
    for setting in SETTING.findall(page.read_text().replace("with `KillMode=mixed` systemd", "")):
        assert all(setting in unit for unit in UNITS), setting


def test_the_units_wait_for_the_addresses_to_listen_on() -> None:
    for unit in UNITS:
        for key in ("After", "Wants"):
            (line,) = (line for line in unit if line.startswith(f"{key}="))
            assert "network-online.target" in line


def test_something_is_said_of_them() -> None:
    said = {each for page in DEPLOY.glob("*.md") for each in SETTING.findall(page.read_text())}
    assert {"KillMode=process", "Restart=on-failure"} <= said

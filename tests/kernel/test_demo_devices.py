"""The demonstration where there are devices: it uses them."""

from __future__ import annotations

import sys

import pytest

from tests.commands import attached, run

pytestmark = pytest.mark.kernel


def test_the_demonstration_is_on_devices() -> None:
    output = run(sys.executable, "-m", "reactor.demo", "--once")
    assert "disk memory: /dev/nbd" in output
    assert output.count("every byte read is as written") == 2
    assert not attached("/dev/nbd0")
    assert not attached("/dev/nbd1")

"""Thousands of lives of the control plane, each from one seed, in virtual time.

`python -m tests.simulation SEED` shows all that happens in one of them. NBD_REACTOR_SEED, if it is
set, is the first seed of those that run here.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST = int(os.environ.get("NBD_REACTOR_SEED", "0"))
COUNT = int(os.environ.get("NBD_REACTOR_SIMULATIONS", "2000"))


def simulate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(600)
def test_whatever_dies_when_nothing_is_lost() -> None:
    done = simulate("--seeds", str(COUNT), "--first", str(FIRST))
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_seed_makes_the_same_happen_in_every_process() -> None:
    for seed in range(FIRST, FIRST + 4):
        one, other = (simulate(str(seed), PYTHONHASHSEED=salt).stdout for salt in ("1", "2"))
        assert len(one.splitlines()) > 20
        assert one == other

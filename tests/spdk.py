"""Runs SPDK's own client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.running import RunningService


def spdk_rpc(
    running: RunningService, *arguments: str, script: str | None = None, status: int = 0
) -> str:
    """Run the command `spdk-rpc`; returns what it printed."""
    done = subprocess.run(
        [
            str(Path(sys.executable).parent / "spdk-rpc"),
            *("-s", str(running.rpc_socket)),
            *arguments,
        ],
        input=script,
        stdin=subprocess.DEVNULL if script is None else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == status, done.stdout
    return done.stdout

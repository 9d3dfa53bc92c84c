"""Runs tools/bench."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "tools/bench.d"


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run it from its beginning to its end."""
    return subprocess.run(
        [sys.executable, str(BENCH), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, **environment},
    )


def path_with(tmp_path: Path, *names: str) -> str:
    """Return a PATH on which there are only these commands, and what pins processes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("taskset", "nice", *names):
        found = shutil.which(name)
        assert found, name
        (folder / name).symlink_to(found)
    return str(folder)

"""The commands of README.md."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```console( run)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(*, run: bool) -> list[str]:
    """Return the commands of the blocks that are marked with `run`, or of those that are not."""
    return [
        line.removeprefix("$ ")
        for marked, block in BLOCK.findall((ROOT / "README.md").read_text())
        if bool(marked) == run
        for line in block.splitlines()
        if line.startswith("$ ")
    ]

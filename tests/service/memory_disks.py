"""Memory disks on unix sockets: their config, and a client's view of them."""

from __future__ import annotations

from pathlib import Path

from tests import commands


def ram(tmp_path: Path, *names: str, more: str = "") -> str:
    """Return a config of disks, each on the socket of its name; `more` goes to each."""
    lines = "".join(
        f"  {name}: {{backend: malloc, size: 8MiB, listen: 'unix:{tmp_path}/{name}.sock'{more}}}\n"
        for name in names
    )
    return f"disks:\n{lines}"


def nbdsh(tmp_path: Path, name: str, script: str, *, on: str = "") -> str:
    """Run a script of libnbd's shell on the disk `name`, at the socket `on` or of its own name."""
    return commands.nbdsh(f"nbd+unix:///{name}?socket={tmp_path}/{on or name}.sock", script)

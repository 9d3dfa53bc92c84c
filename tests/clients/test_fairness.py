"""What tools/bench measures of a quiet disk beside busy ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "tools/bench.d"
SCRIPT = """
import sys
from pathlib import Path
import fairness, servers
place = servers.Place(Path(sys.argv[1], "server"), Path("none"), 0, 0, None)
with servers.running(servers.OURS, "memory", servers.reactor_with_many_disks, place) as server:
    found = fairness.measure_fairness(Path(sys.argv[2]), 0, server, 0.2)
assert list(found) == list(fairness.NEIGHBOURS)
assert all(told["requests"] > 0 for told in found.values()), found
"""
REFUSED_SCRIPT = """
import sys
from pathlib import Path
import fairness, servers
def refuse_writes(place):
    command = servers.reactor_with_many_disks(place)
    config = place.folder / "disks.yaml"
    config.write_text(config.read_text().replace("d1: {", "d1: {readonly: true, "))
    return command
place = servers.Place(Path(sys.argv[1], "server"), Path("none"), 0, 0, None)
with servers.running(servers.OURS, "memory", refuse_writes, place) as server:
    try:
        fairness.measure_fairness(Path(sys.argv[2]), 0, server, 0.2)
    except servers.BenchError as error:
        assert "a request failed: Operation not permitted" in str(error), error
    else:
        sys.exit("a writer failed, and was counted as a busy neighbour")
"""


def test_a_reader_beside_writers_is_served(tmp_path: Path) -> None:
    run(SCRIPT, tmp_path)


def test_a_writer_that_fails_is_no_busy_neighbour(tmp_path: Path) -> None:
    run(REFUSED_SCRIPT, tmp_path)


def run(script: str, tmp_path: Path) -> None:
    load = tmp_path / "load"
    subprocess.run(["gcc", "-std=gnu11", "-O2", "-o", load, BENCH / "load.c"], check=True)
    subprocess.run(
        [sys.executable, "-c", script, tmp_path, load],
        env={"PYTHONPATH": f"{BENCH}:{BENCH.parents[1]}", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
        check=True,
        timeout=100,
    )

"""Runs seeds: `python -m tests.simulation SEED` shows all that one makes happen.

`python -m tests.simulation --seeds N [--first SEED]` runs N of them, on all CPUs, and names those
that fail.
"""

from __future__ import annotations

import argparse
import sys
import time
from multiprocessing import Pool

from tests.simulation.scenario import Scenario


def problems(seed: int) -> tuple[int, list[str]]:
    """Return what goes wrong with a seed."""
    return seed, Scenario(seed).run()


def main() -> int:
    """Return 1 when a seed fails."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.seed is not None:
        scenario = Scenario(arguments.seed, tracing=True)
        wrong = scenario.run()
        sys.stdout.write("\n".join([*(scenario.world.trace or ()), ""]))
        return bool(wrong)
    began = time.perf_counter()
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    failed = 0
    with Pool() as pool:
        for seed, wrong in pool.imap(problems, seeds, chunksize=20):
            if wrong:
                failed += 1
                sys.stdout.write(f"seed {seed}: {wrong[0]}\n")
    seconds = time.perf_counter() - began
    sys.stdout.write(f"{failed} of {len(seeds)} seeds fail; {seconds:.1f} s\n")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())

"""What nbd-reactor is to reach: goals are told, bounds on what is counted fail a build."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from loads import Measures
from points import COUNTS, LARGE, Case, Point
from results import Results, Spread, best_of, ratio
from servers import FLOOR, MANY, NATIVE_ENGINES, OURS

DIRECTIONS: Final = (100, 0)  # reads and writes
SMALL: Final = 4096
#: By depth: how much of the best other server's IOPS, and of the floor's, on a memory disk.
SMALL_GOALS: Final = {1: (1.0, None), 8: (1.3, None), 32: (2.0, 0.6), 128: (3.0, 0.5)}
LARGE_GOALS: Final = (1.0, 0.8)
FILE_TO_NBDKIT: Final = 1.5
DIRECT_TO_FIO: Final = 0.8
CPU_TO_NBDKIT_MAX: Final = 0.5
SYSCALLS_MAX: Final = 0.25  # as measured, polls that find nothing included
PYTHON_TO_NBDKIT: Final = 3.0
IDLE_MAX: Final = 0.0005  # of a core, by all processes: up to here it is 0.0 %
WORKER_MIB_MAX: Final = 40

#: Three calls for 32 requests: server and load take turns, and nothing is polled in vain.
COUNTED_SYSCALLS_MAX: Final = 0.1
#: What a request may cost at most; more fails a build. Copies are of its payload, in user space.
#: Allocations are a tenth above what they were when they were last bounded.
BOUNDS: Final[Mapping[Point, Measures]] = {
    Point(100, SMALL, 1): {"allocations": 62.5, "copies": 0},
    Point(0, SMALL, 1): {"allocations": 67, "copies": 1},
    Point(100, SMALL, 32): {"syscalls": COUNTED_SYSCALLS_MAX, "allocations": 15.7, "copies": 0},
    Point(0, SMALL, 32): {"syscalls": COUNTED_SYSCALLS_MAX, "allocations": 17.2, "copies": 1},
    Point(0, 128 << 10, 1): {"allocations": 70.3, "copies": 1},
    Point(0, 128 << 10, 32): {"allocations": 58.5, "copies": 1},
    Point(0, 1 << 20, 1): {"allocations": 191, "copies": 0.3},
    Point(0, 1 << 20, 32): {"allocations": 172, "copies": 0.3},
}
LARGE_ALLOCATIONS_MAX: Final = 0.05  # one of a short run is some buffer that had to grow
#: What the tail of a run may add to a count that is a whole number for each request.
SLACK: Final = 0.005


@dataclass(frozen=True)
class Verdict:
    """A goal and what was found, None when it was not measured."""

    goal: str
    found: float | None
    least: float | None = None
    most: float | None = None
    form: str = ".2f"

    @property
    def met(self) -> bool | None:
        """Whether it was reached, None when it was not measured."""
        if self.found is None:
            return None
        if self.least is not None:
            return self.found >= self.least
        assert self.most is not None
        return self.found <= self.most

    @property
    def shown(self) -> str:
        """What was found, so that a goal missed by little does not look met."""
        assert self.found is not None
        bound = self.most if self.least is None else self.least
        text = f"{self.found:{self.form}}"
        if self.met or text != f"{bound:{self.form}}":
            return text
        return f"{self.found:{self.form.replace('.2', '.4')}}"

    @property
    def wanted(self) -> str:
        """As in `>= 1.30`."""
        bound = self.most if self.least is None else self.least
        return f"{'<=' if self.least is None else '>='} {bound:{self.form}}"


def verdicts(results: Results) -> list[Verdict]:
    """Compare what was measured with every goal."""
    return [*_memory_disks(results), *_other_disks(results), *_costs(results)]


def counted(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """Return the case, the measure, what was counted and its bound, of all that was counted."""
    for point, bounds in BOUNDS.items():
        name = Case(COUNTS, "batched", point).name
        found = results.counts.get(name, {})
        for measure, most in (*bounds.items(), ("large allocations", LARGE_ALLOCATIONS_MAX)):
            if measure in found:
                yield name, measure, found[measure], most


def broken_bounds(results: Results) -> list[str]:
    """Return what costs more than it may."""
    return [
        f"{name}: {measure}: {found:.3f} per request, more than {most:g}"
        for name, measure, found, most in counted(results)
        if found > most + SLACK
    ]


def unproven(results: Results, cases: Sequence[Case], *, may_trace: bool) -> list[str]:
    """Return where ours was not measured or counted, or every case when nothing was.

    Where nobody `may_trace`, system calls need not be counted. What nothing was measured by, such
    as fio, is not installed.
    """
    if not results.counts and not results.cases():
        return [case.name for case in cases]
    loads = {case.load for case in results.cases()}
    missing = []
    for case in cases:
        if case.kind != COUNTS:
            if case.load in loads and not _is_whole(results, case):
                missing.append(f"{case.name}: {OURS}")
            continue
        wanted = set(BOUNDS.get(case.point, {}))
        if not may_trace:
            wanted.discard("syscalls")
        lacking = sorted(wanted - results.counts.get(case.name, {}).keys())
        missing += [f"{case.name}: {measure}" for measure in lacking]
    return missing


def _is_whole(results: Results, case: Case) -> bool:
    """Whether ours was measured as often as anyone."""
    often = {name: len(row.measures["iops"]) for name, row in results.at(case).items()}
    return OURS in often and often[OURS] == max(often.values())


def _memory_disks(results: Results) -> Iterator[Verdict]:
    small = {Point(reads, SMALL, d): g for d, g in SMALL_GOALS.items() for reads in DIRECTIONS}
    for point, (to_best, to_floor) in {**small, **dict.fromkeys(LARGE, LARGE_GOALS)}.items():
        case = Case("memory", "batched", point)
        yield _part_of_the_best(results, case, to_best)
        if to_floor is not None:
            yield _part_of_iops(results, case, [FLOOR], "the floor", to_floor)


def _other_disks(results: Results) -> Iterator[Verdict]:
    for kind, others, least in (
        ("file", ["nbdkit"], FILE_TO_NBDKIT),
        ("direct", NATIVE_ENGINES, DIRECT_TO_FIO),
        ("python", ["nbdkit"], PYTHON_TO_NBDKIT),
    ):
        for reads in DIRECTIONS:
            case = Case(kind, "batched", Point(reads, SMALL, 32))
            yield _part_of_iops(results, case, others, " or ".join(others), least)
    for point in LARGE:
        yield _part_of_the_best(results, Case("file", "batched", point), LARGE_GOALS[0])


def _part_of_the_best(results: Results, case: Case, least: float) -> Verdict:
    peers = results.at(case).keys() - {OURS, FLOOR}
    return _part_of_iops(results, case, sorted(peers), "the best other server", least)


def _part_of_iops(
    results: Results, case: Case, others: Sequence[str], name: str, least: float
) -> Verdict:
    rows = results.at(case)
    found = ratio(rows.get(OURS), best_of(rows[o] for o in others if o in rows), "iops")
    goal = f"{case.kind}, {case.point.description}: IOPS to those of {name}"
    return Verdict(goal, _median(found), least=least)


def _costs(results: Results) -> Iterator[Verdict]:
    for reads in DIRECTIONS:
        point = Point(reads, SMALL, 32)
        rows = results.at(Case("memory", "batched", point))
        ours = rows.get(OURS)
        cpu = ratio(ours, rows.get("nbdkit"), "server_cpu_us")
        what = f"memory, {point.description}"
        yield Verdict(f"{what}: CPU to nbdkit's", _median(cpu), most=CPU_TO_NBDKIT_MAX)
        syscalls = ours.syscalls if ours else None
        yield Verdict(f"{what}: system calls per I/O", syscalls, most=SYSCALLS_MAX)
    idle = results.idle.get(MANY)
    yield Verdict(f"{MANY}: idle CPU of all processes", idle, most=IDLE_MAX, form=".2%")
    trees = [found for name, found in results.memory.items() if name.split("/")[1] in {OURS, MANY}]
    workers = [bytes_ / (1 << 20) for processes in trees for bytes_ in processes[1:]]
    largest = max(workers, default=None)
    yield Verdict("memory of a worker without its disks, MiB", largest, most=WORKER_MIB_MAX)


def _median(spread: Spread | None) -> float | None:
    return spread.median if spread else None

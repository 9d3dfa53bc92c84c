"""What is measured: points of load, on kinds of disk, by loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

#: Kinds of disk. `direct` is a file past the page cache, `python` a disk of 30 lines of Python.
KINDS: Final = ("memory", "file", "direct", "python")
#: Not measured but counted, on a memory disk: the same on any machine.
COUNTS: Final = "counts"
#: Our generator with all that is due in one system call, the same with header and payload apart
#: as the kernel sends them, and fio's own NBD client.
LOADS: Final = ("batched", "apart", "fio")


@dataclass(frozen=True)
class Point:
    """One load: `reads` in percent, `bytes` of each request, `depth` in flight."""

    reads: int
    bytes: int
    depth: int
    sequential: bool = False

    @property
    def name(self) -> str:
        """As in `randread-4k-32`."""
        verb = {100: "read", 0: "write"}.get(self.reads, "mixed")
        order = "" if self.sequential else "rand"
        size = f"{self.bytes >> 20}m" if self.bytes >= 1 << 20 else f"{self.bytes >> 10}k"
        return f"{order}{verb}-{size}-{self.depth}"

    @property
    def description(self) -> str:
        """As in `4 KiB random reads, depth 32`."""
        verb = {100: "reads", 0: "writes"}.get(self.reads, f"I/O, {self.reads} % reads")
        order = "sequential" if self.sequential else "random"
        size = f"{self.bytes >> 20} MiB" if self.bytes >= 1 << 20 else f"{self.bytes >> 10} KiB"
        return f"{size} {order} {verb}, depth {self.depth}"


@dataclass(frozen=True)
class Case:
    """A point on a kind of disk by a load; every server of that kind runs it."""

    kind: str
    load: str
    point: Point
    quick: bool = field(default=False, compare=False)

    @property
    def name(self) -> str:
        """As in `memory/batched/randread-4k-32`."""
        return f"{self.kind}/{self.load}/{self.point.name}"


DEPTHS: Final = (1, 8, 32, 128)
SMALL: Final = tuple(Point(reads, 4096, depth) for reads in (100, 0) for depth in DEPTHS)
LARGE: Final = tuple(
    Point(reads, size, 8, sequential=True) for size in (128 << 10, 1 << 20) for reads in (100, 0)
)
MIXED: Final = (Point(70, 4096, 32),)


#: What a request costs is counted for these.
COUNTED: Final = tuple(
    Point(reads, size, depth)
    for reads, size in ((100, 4096), (0, 4096), (0, 128 << 10), (0, 1 << 20))
    for depth in (1, 32)
)


def _cases() -> tuple[Case, ...]:
    cases = [Case(COUNTS, "batched", point, quick=True) for point in COUNTED]
    for kind in KINDS:
        for point in SMALL if kind == "python" else (*SMALL, *LARGE, *MIXED):
            quick = kind == "memory" or (point in SMALL and point.depth == 32)
            cases.append(Case(kind, "batched", point, quick and point not in MIXED))
    for point in SMALL:
        cases.append(Case("memory", "apart", point))
        cases.append(Case("memory", "fio", point, point.depth == 32))
        if point.depth == 32:
            cases += [Case("file", "fio", point), Case("python", "fio", point)]
    order = {name: place for place, name in enumerate((COUNTS, *KINDS, *LOADS))}
    return tuple(sorted(cases, key=lambda case: (order[case.kind], order[case.load])))


CASES: Final = _cases()

"""What was measured, and what it says: medians, extremes and ratios."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from loads import Measures
from points import Case
from servers import FLOOR, OURS


@dataclass(frozen=True)
class Spread:
    """The median of some repetitions, and the extremes."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Sum up at least one value."""
        sorted_values = sorted(values)
        return cls(statistics.median(sorted_values), sorted_values[0], sorted_values[-1])


@dataclass
class Row:
    """One server at one case: a list of every measure, one value for each repetition."""

    case: Case
    server: str
    measures: dict[str, list[float]] = field(default_factory=dict)
    syscalls: float | None = None  # a request

    def add(self, measured: dict[str, float]) -> None:
        """Add one repetition."""
        for name, value in measured.items():
            self.measures.setdefault(name, []).append(value)

    def spread(self, name: str) -> Spread:
        """Sum a measure up."""
        return Spread.of(self.measures[name])


@dataclass
class Results:
    """Everything that one run found. Memory in bytes, idle in CPU seconds a second."""

    about: dict[str, Any]
    counts: dict[str, Measures] = field(default_factory=dict)  # of a request, by case
    rows: list[Row] = field(default_factory=list)
    memory: dict[str, list[int]] = field(default_factory=dict)  # of each process, by KIND/SERVER
    idle: dict[str, float] = field(default_factory=dict)
    idle_busiest: dict[str, float] = field(default_factory=dict)  # of the busiest process
    fairness: dict[str, Measures] = field(default_factory=dict)  # of a reader, by its neighbours
    notes: list[str] = field(default_factory=list)

    def at(self, case: Case) -> dict[str, Row]:
        """Return the rows of a case by server; those that were measured."""
        return {row.server: row for row in self.rows if row.case == case and row.measures}

    def cases(self) -> list[Case]:
        """Return the cases that were measured, in order."""
        return list(dict.fromkeys(row.case for row in self.rows if row.measures))


@dataclass(frozen=True)
class Ratios:
    """Ours against the best of the others, and against the floor, at one case."""

    case: Case
    iops: float
    best: str | None
    to_best: Spread | None
    to_floor: Spread | None
    cpu_to_nbdkit: Spread | None


def best_of(rows: Iterable[Row]) -> Row | None:
    """Return the row with the most IOPS."""
    return max(rows, key=lambda row: row.spread("iops").median, default=None)


def ratios(results: Results) -> list[Ratios]:
    """Compare at every case where ours was measured."""
    found = []
    for case in results.cases():
        rows = results.at(case)
        if OURS not in rows:
            continue
        ours = rows.pop(OURS)
        floor = rows.pop(FLOOR, None)
        best = best_of(rows.values())
        found.append(
            Ratios(
                case,
                ours.spread("iops").median,
                best.server if best else None,
                ratio(ours, best, "iops"),
                ratio(ours, floor, "iops"),
                ratio(ours, rows.get("nbdkit"), "server_cpu_us"),
            )
        )
    return found


def ratio(one: Row | None, other: Row | None, name: str) -> Spread | None:
    """Compare repetition by repetition: what ran side by side had the same machine."""
    if one is None or other is None:
        return None
    pairs = zip(one.measures[name], other.measures[name], strict=False)
    quotients = [a / b for a, b in pairs if b]
    return Spread.of(quotients) if quotients else None

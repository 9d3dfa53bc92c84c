"""Keeps what a run found as JSON, for later and for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import goals
from points import Case, Point
from results import Results, Row, ratios


def as_json(results: Results) -> str:
    """Return all of it; a line for each row. What follows from the others is told too."""
    found = {
        "about": results.about,
        "notes": results.notes,
        "counts": results.counts,
        "memory_bytes": results.memory,
        "idle_cpu": results.idle,
        "idle_cpu_of_busiest_process": results.idle_busiest,
        "fairness": results.fairness,
    }
    lists = {
        "rows": [_row(row) for row in results.rows if row.measures],
        "ratios": [asdict(each) | {"case": each.case.name} for each in ratios(results)],
        "goals": [asdict(each) | {"met": each.met} for each in goals.verdicts(results)],
    }
    parts = [f'"{name}": {json.dumps(_rounded(part), indent=1)}' for name, part in found.items()]
    for name, lines in lists.items():
        text = ",\n".join(json.dumps(_rounded(line)) for line in lines)
        parts.append(f'"{name}": [\n{text}\n]')
    return "{{\n{}\n}}\n".format(",\n".join(parts))


def from_json(text: str) -> Results:
    """Return what an earlier run found. Raises ValueError, KeyError or TypeError."""
    found = json.loads(text)
    rows = []
    for row in found["rows"]:
        point = Point(row["reads"], row["bytes"], row["depth"], row["sequential"])
        case = Case(row["kind"], row["load"], point)
        rows.append(Row(case, row["server"], row["repetitions"], row["syscalls"]))
    return Results(
        about=found["about"],
        counts=found["counts"],
        rows=rows,
        memory=found["memory_bytes"],
        idle=found["idle_cpu"],
        idle_busiest=found.get("idle_cpu_of_busiest_process", {}),  # older runs did not ask
        fairness=found["fairness"],
        notes=found["notes"],
    )


def _row(row: Row) -> dict[str, Any]:
    return {
        "name": row.case.name,
        "kind": row.case.kind,
        "load": row.case.load,
        **asdict(row.case.point),
        "server": row.server,
        "syscalls": row.syscalls,
        "repetitions": row.measures,
        "median": {name: row.spread(name).median for name in row.measures},
    }


def _rounded(value: Any) -> Any:
    """Return JSON data with floats of five digits: nothing here is measured better."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value

"""IOPS over depth as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from points import DEPTHS, Case, Point
from results import Results, Spread
from servers import FLOOR, OURS

WIDTH: Final = 420
HEIGHT: Final = 300
LEFT: Final = 64
RIGHT: Final = 100
TOP: Final = 44
BOTTOM: Final = 44
LABEL_HEIGHT: Final = 14
#: On white and on black; mostly Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS: Final = {
    OURS: ("#0072b2", "#56b4e9"),
    FLOOR: ("#6e6e6e", "#a0a0a0"),
    "nbdkit": ("#d55e00", "#e69f00"),
    "qemu-nbd": ("#009e73", "#2fc99b"),
    "nbd-server": ("#b0578d", "#cc79a7"),
}
PAPER: Final = ("#ffffff", "#0d1117")
INK: Final = ("#1f2328", "#e6edf3")
GRID: Final = ("#d8dee4", "#30363d")

Series = dict[str, dict[int, Spread]]


def as_svg(results: Results) -> str:
    """Draw 4 KiB random reads and writes on memory disks, side by side."""
    all_series = [_series(results, reads) for reads in (100, 0)]
    spreads = [each for series in all_series for line in series.values() for each in line.values()]
    step = _step(max((each.most for each in spreads), default=1.0))
    top = step * math.ceil(max((each.most for each in spreads), default=1.0) / step)
    panels = [
        _panel(f"4 KiB random {verb}, memory disk", series, x, top, step)
        for verb, series, x in zip(("reads", "writes"), all_series, (0, WIDTH), strict=True)
    ]
    size = f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif"'
    paper = f'<rect class="paper" width="{2 * WIDTH}" height="{HEIGHT}" fill="currentColor"/>'
    return "\n".join([f'{head} font-size="12">', _style(), paper, *panels, "</svg>\n"])


def _style() -> str:
    """Return the colours, by what the reader's pages are."""
    classes = {"paper": PAPER, "ink": INK, "grid": GRID, **COLORS}
    light, dark = (
        " ".join(f".{name} {{ color: {colors[which]} }}" for name, colors in classes.items())
        for which in (0, 1)
    )
    return f"<style>\n{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n</style>"


def _series(results: Results, reads: int) -> Series:
    found: dict[str, dict[int, Spread]] = {}
    for depth in DEPTHS:
        for name, row in results.at(Case("memory", "batched", Point(reads, 4096, depth))).items():
            found.setdefault(name, {})[depth] = row.spread("iops")
    return found


def _panel(title: str, series: Series, x: int, top: float, step: float) -> str:
    parts = [f'<g class="ink" transform="translate({x} 0)">']
    parts.append(f'<g font-weight="bold">{_text(LEFT, 18, title)}</g>')
    for number in range(round(top / step) + 1):
        y = _y(number * step, top)
        parts.append(f'<g class="grid">{_line([(LEFT, y), (WIDTH - RIGHT, y)], 1)}</g>')
        parts.append(
            _text(LEFT - 6, y + 4, f"{number * step / 1000:,.0f}k" if number else "0", anchor="end")
        )
    below = HEIGHT - BOTTOM + 18
    parts += [_text(_x(depth), below, str(depth), anchor="middle") for depth in DEPTHS]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 8, "requests in flight", anchor="middle"))
    parts.append(_text(LEFT - 6, TOP - 12, "IOPS", anchor="end"))
    labels = _label_places({name: _y(line[max(line)].median, top) for name, line in series.items()})
    for name, line in reversed(series.items()):  # ours above the others
        label = _text(WIDTH - RIGHT + 8, labels[name] + 4, name)
        parts.append(
            f'<g class="{name}">{_curve(line, top, 3 if name == OURS else 1.5)}{label}</g>'
        )
    return "\n".join([*parts, "</g>"])


def _curve(line: Mapping[int, Spread], top: float, width: float) -> str:
    """Draw the medians as a line, and what was between the extremes as bars."""
    points = {depth: (_x(depth), _y(each.median, top)) for depth, each in line.items()}
    parts = [_line(list(points.values()), width)]
    for depth, (x, y) in points.items():
        ends = [(x, _y(end, top)) for end in (line[depth].least, line[depth].most)]
        parts.append(_line(ends, 1))
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{1.5 + width / 2}" fill="currentColor"/>'
        )
    return "".join(parts)


def _label_places(wanted: Mapping[str, float]) -> dict[str, float]:
    """Move labels apart, from the lowest up."""
    places: dict[str, float] = {}
    below = math.inf
    for name, y in sorted(wanted.items(), key=lambda item: -item[1]):
        below = min(y, below - LABEL_HEIGHT)
        places[name] = below
    return places


def _step(most: float) -> float:
    """Return a round distance for four to ten lines."""
    power: float = 10 ** math.floor(math.log10(most / 4))
    return power * max(factor for factor in (1, 2, 2.5, 5) if factor * power <= most / 4)


def _x(depth: int) -> float:
    width = WIDTH - RIGHT - LEFT
    return LEFT + width * math.log2(depth) / math.log2(DEPTHS[-1])


def _y(iops: float, top: float) -> float:
    return TOP + (HEIGHT - BOTTOM - TOP) * (1 - iops / top)


def _line(points: Sequence[tuple[float, float]], width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor"'
    return f"<text {place}>{escape(text)}</text>"

"""IOPS over depth as an SVG picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final
from xml.sax.saxutils import escape

from points import DEPTHS, Case, Point
from results import Results, Spread

WIDTH: Final = 420
HEIGHT: Final = 300
LEFT: Final = 64
RIGHT: Final = 100
TOP: Final = 36
BOTTOM: Final = 44
#: Okabe and Ito's colours, which the colour-blind can tell apart.
COLORS: Final = ("#0072b2", "gray", "#d55e00", "#009e73", "#cc79a7")
LABEL_HEIGHT: Final = 14

Series = Mapping[str, Mapping[int, Spread]]


def as_svg(results: Results) -> str:
    """Draw 4 KiB random reads and writes on memory disks, side by side."""
    panels = [
        _panel(title, _series(results, reads), x)
        for title, reads, x in (("random reads", 100, 0), ("random writes", 0, WIDTH))
    ]
    size = f'width="{2 * WIDTH}" height="{HEIGHT}" viewBox="0 0 {2 * WIDTH} {HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}'
    style = 'font-family="sans-serif" font-size="12" fill="black">'
    white = '<rect width="100%" height="100%" fill="#ffffff"/>'  # pages may be dark
    return "\n".join([f"{head} {style}", white, *panels, "</svg>\n"])


def _series(results: Results, reads: int) -> Series:
    found: dict[str, dict[int, Spread]] = {}
    for depth in DEPTHS:
        for name, row in results.at(Case("memory", "batched", Point(reads, 4096, depth))).items():
            found.setdefault(name, {})[depth] = row.spread("iops")
    return found


def _panel(title: str, series: Series, x: int) -> str:
    most = max((each.most for line in series.values() for each in line.values()), default=1.0)
    step = _step(most)
    top = math.ceil(most / step) * step
    parts = [f'<g transform="translate({x} 0)">', _text(LEFT, 20, f"4 KiB {title}, memory disk")]
    for number in range(round(top / step) + 1):
        y = _y(number * step, top)
        parts.append(_line([(LEFT, y), (WIDTH - RIGHT, y)], "lightgray", 1))
        parts.append(_text(LEFT - 6, y + 4, f"{number * step / 1000:,.0f}k", anchor="end"))
    below = HEIGHT - BOTTOM + 18
    parts += [_text(_x(depth), below, str(depth), anchor="middle") for depth in DEPTHS]
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(_text(middle, HEIGHT - 8, "requests in flight", anchor="middle"))
    parts.append(_text(LEFT - 6, TOP - 10, "IOPS", anchor="end"))
    labels = _label_places({name: _y(line[max(line)].median, top) for name, line in series.items()})
    for color, (name, line) in zip(COLORS, series.items(), strict=False):
        parts += _curve(line, color, top)
        parts.append(_text(WIDTH - RIGHT + 8, labels[name] + 4, name, color=color))
    return "\n".join([*parts, "</g>"])


def _curve(line: Mapping[int, Spread], color: str, top: float) -> list[str]:
    points = [(_x(depth), _y(each.median, top)) for depth, each in line.items()]
    parts = [_line(points, color, 2)]
    for depth, each in line.items():
        x = _x(depth)
        parts.append(_line([(x, _y(each.least, top)), (x, _y(each.most, top))], color, 1))
        y = _y(each.median, top)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>')
    return parts


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


def _line(points: Sequence[tuple[float, float]], color: str, width: int) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", color: str = "black") -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {place}>{escape(text)}</text>"

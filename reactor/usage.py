"""The end of what --help says, from what the manual says too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

SHORT_MAX: Final = 20  # characters of a term that has its meaning beside it


def epilog(**sections: Mapping[str, str]) -> str:
    """Return the sections, of terms and their meanings, as they look on a terminal."""
    return "\n".join(_section(title, terms) for title, terms in sections.items())


def _section(title: str, terms: Mapping[str, str]) -> str:
    width = max(map(len, terms))
    between = "  " if width <= SHORT_MAX else "\n" + " " * 6
    pad = width if width <= SHORT_MAX else 0
    lines = [f"  {term:{pad}}{between}{meaning}\n" for term, meaning in terms.items()]
    return f"{title.replace('_', ' ')}:\n{''.join(lines)}"

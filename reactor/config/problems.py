"""What is wrong with a config: collected, placed and told in one go."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from itertools import islice
from typing import Final

from reactor.errors import ConfigError, quoted

#: Nobody reads more, and suggestions for every line of a hostile file would take minutes.
PROBLEMS_MAX: Final = 100
LISTED_MAX: Final = 20


class Problems:
    """The problems found so far in `file` (None: the disk does not come from a file)."""

    def __init__(self, file: str | None = None) -> None:
        self._file = file
        self._found: dict[tuple[int, str], None] = {}  # a set that keeps its order

    def add(self, line: int, place: str, problem: str) -> None:
        """Note a problem; the same one is told once. Raises ConfigError when they are too many."""
        self._found[line, f"{place}: {problem}" if place else problem] = None
        if len(self._found) == PROBLEMS_MAX:
            raise self.error(f"only the first {PROBLEMS_MAX} problems are shown")

    def __len__(self) -> int:
        return len(self._found)

    def error(self, last: str | None = None) -> ConfigError:
        """Return all problems as an exception, ordered by line; `last` is a line to end with."""
        ordered = sorted(self._found, key=lambda found: found[0])
        if self._file is None:
            lines = [text for _, text in ordered]
        else:
            lines = [f"{self._file}:{line}: {text}" for line, text in ordered]
        return ConfigError([*lines, last] if last else lines)


def unknown(kind: str, word: str, valid: Iterable[str], *, list_all: bool = False) -> str:
    """Return the problem that `word` is no `kind`, with the nearest valid one, else all of them."""
    choices = list(valid)
    near = difflib.get_close_matches(word[:128], choices, n=1)
    hints = [f"did you mean {quoted(near[0])}?"] if near else []
    if list_all or not near:
        hints.append(f"there are {listed(choices)}")
    return f"unknown {kind} {quoted(word)}; {' '.join(hints)}"


def listed(words: Iterable[str]) -> str:
    """Return the words as one list, cut if it is long."""
    shown = list(islice(words, LISTED_MAX + 1))
    return ", ".join([*shown[:LISTED_MAX], "…"] if len(shown) > LISTED_MAX else shown) or "none"

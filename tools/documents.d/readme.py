"""The tables of keys in README.md."""

from __future__ import annotations

from typing import Final

from keys import NAMES, backend_about, backend_keys

from reactor.config.keys import COMMON

BEGIN: Final = "<!-- written by tools/documents -->\n"
END: Final = "<!-- end of what tools/documents writes -->\n"


def with_tables(text: str) -> str:
    """Return the README with its tables renewed."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit("README.md has no place for the tables of keys")
    return f"{before}{BEGIN}{_common()}\n{_backends()}{END}{after}"


def _common() -> str:
    lines = ["| key of every disk | meaning | default |", "|---|---|---|"]
    lines += [f"| `{name}` | {key.meaning} | {key.default} |" for name, key in COMMON.items()]
    return "\n".join(lines) + "\n"


def _backends() -> str:
    lines = ["| backend | what it is | its keys |", "|---|---|---|"]
    for name in NAMES:
        told = [
            f"`{key.name}`{' (required)' if key.required else ''}: {key.meaning}"
            for key in backend_keys(name)
        ]
        lines.append(f"| `{name}` | {backend_about(name)} | {'; '.join(told)} |")
    return "\n".join(lines) + "\n"

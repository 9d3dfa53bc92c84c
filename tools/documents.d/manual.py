"""Manual pages: prose from the templates beside this file, the rest from the code."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from keys import NAMES, backend_about, backend_keys
from programs import CONTROL, SERVICE, Argument, Command

from reactor import __version__, cli, ctl
from reactor.config.keys import COMMON, REQUIRED, CommonKey

HERE: Final = Path(__file__).parent
WIDTH: Final = 78
PAGES: Final = ("nbd-reactor.8", "nbd-reactorctl.8", "disks.yaml.5")


def page(name: str) -> str:
    """Return a page: its template, with each line that is an @name@ replaced."""
    parts = _parts(name)
    lines = []
    for line in (HERE / f"{name}.in").read_text().splitlines():
        whole = re.fullmatch(r"@([a-z_]+)@", line)
        lines.append(parts[whole[1]] if whole else line.replace("@version@", __version__))
    return '.\\" written by tools/documents\n' + "\n".join(lines) + "\n"


def _parts(name: str) -> dict[str, str]:
    if name == "disks.yaml.5":
        return {"keys": _common(), "backends": _backends(), "example": _example()}
    if name == "nbd-reactor.8":
        return {
            "options": _options(SERVICE),
            "signals": _terms(cli.SIGNALS),
            "exit_status": _terms(cli.EXIT_STATUS),
            "examples": _terms(cli.EXAMPLES),
        }
    return {
        "options": _options(CONTROL),
        "commands": _commands(CONTROL),
        "exit_status": _terms(ctl.EXIT_STATUS),
        "examples": _terms(ctl.EXAMPLES),
    }


def _options(program: Command) -> str:
    only = len(program.groups) == 1
    parts = []
    for title, group in program.groups.items():
        if not only and title != "options":
            parts.append(f".SS {_text(title.capitalize())}")
        parts += [_item(_signature(each), _sentence(each.help)) for each in group]
    return "\n".join(parts)


def _commands(program: Command) -> str:
    parts = []
    for command in program.commands:
        places = [_place(each) for each in command.places]
        parts.append(_item(" ".join([_bold(command.name), *places]), _sentence(command.help)))
    return "\n".join(parts)


def _place(argument: Argument) -> str:
    name = _italic(argument.metavar)
    if argument.repeated:
        return f"[{name} ...]"
    return f"[{name}]" if argument.metavar == "JSON" else name


def _signature(argument: Argument) -> str:
    flags = ", ".join(_bold(flag) for flag in argument.flags)
    return f"{flags} {_italic(argument.metavar)}" if argument.metavar else flags


def _common() -> str:
    return "\n".join(
        _item(_bold(name), f"{_sentence(key.meaning)} {_default(key)}.")
        for name, key in COMMON.items()
    )


def _default(key: CommonKey) -> str:
    return "Required" if key.default == REQUIRED else f"Default: {key.default}"


def _backends() -> str:
    parts = []
    for name in NAMES:
        parts += [f".SS {_text(name)}", _text(_sentence(backend_about(name)))]
        for key in backend_keys(name):
            needed = " Required." if key.required else ""
            parts.append(_item(_bold(key.name), _sentence(key.meaning) + needed))
    return "\n".join(parts)


def _example() -> str:
    text = (HERE.parents[1] / "examples/disks.yaml").read_text()
    return _escaped(re.sub(r"^#.*\n| +#.*", "", text, flags=re.MULTILINE).rstrip())


def _terms(terms: Mapping[str, str]) -> str:
    return "\n".join(_item(_bold(term), _sentence(about)) for term, about in terms.items())


def _item(head: str, text: str) -> str:
    return f".TP\n{head}\n{_text(text)}"


def _sentence(text: str) -> str:
    if not text:
        return text
    first = text[0].upper() if re.match(r"[a-z]+([ ,:;-]|$)", text) else text[0]
    return f"{first}{text[1:]}."


def _text(text: str) -> str:
    """Return prose as roff has it, with what is between backticks in bold."""
    plain = (_escaped(part) for part in text.split("`"))
    marked = "".join(f"\\fB{p}\\fR" if odd % 2 else p for odd, p in enumerate(plain))
    lines = [line for sentence in _sentences(marked) for line in _wrapped(sentence)]
    return "\n".join("\\&" + line if line[:1] in {".", "'"} else line for line in lines)


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _sentences(text: str) -> Iterable[str]:
    """Each sentence begins on its own line: then roff knows its end."""
    return re.sub(r"(?<=[a-z0-9)R])\. (?=[A-Z])", ".\n", text).split("\n")


def _bold(text: str) -> str:
    return f"\\fB{_escaped(text)}\\fR"


def _italic(text: str) -> str:
    return f"\\fI{_escaped(text)}\\fR"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")

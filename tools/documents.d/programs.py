"""The programs as their own parsers know them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from typing import Final

from reactor import cli, ctl

#: What completes an argument, by what it is called; nothing completes the others.
KINDS: Final = {"FILE": "file", "PATH": "file", "DIR": "directory", "DISK": "disk"}
KEYS: Final = "KEY=VALUE"
RUNTIME_DIR: Final = (
    "/run/nbd-reactor for root, else nbd-reactor in $XDG_RUNTIME_DIR, else /tmp/nbd-reactor-UID"
)


@dataclass(frozen=True)
class Argument:
    """An option, or (without flags) an argument by its place."""

    flags: tuple[str, ...]
    metavar: str  # "" for an option without a value
    help: str
    choices: tuple[str, ...]
    repeated: bool

    @property
    def kind(self) -> str:
        """What completes its value: file, directory, disk, keys, or nothing."""
        return "keys" if self.metavar == KEYS else KINDS.get(self.metavar, "")

    @property
    def short(self) -> str:
        """The beginning of its help, for a list of completions."""
        return re.split(r"[;:(]", self.help)[0].strip().rstrip(",")


@dataclass(frozen=True)
class Command:
    """A program, or a command of one."""

    name: str
    help: str
    groups: dict[str, list[Argument]]
    commands: tuple[Command, ...] = ()

    @property
    def options(self) -> list[Argument]:
        """What begins with a dash."""
        return [each for group in self.groups.values() for each in group if each.flags]

    @property
    def places(self) -> list[Argument]:
        """What is told by its place."""
        return [each for group in self.groups.values() for each in group if not each.flags]


def _command(name: str, parser: argparse.ArgumentParser, about: str) -> Command:
    groups: dict[str, list[Argument]] = {}
    commands: tuple[Command, ...] = ()
    for group in parser._action_groups:
        for action in group._group_actions:
            if isinstance(action, argparse._SubParsersAction):
                helps = {each.dest: each.help or "" for each in action._choices_actions}
                commands = tuple(
                    _command(name, parser, helps[name]) for name, parser in action.choices.items()
                )
            else:
                groups.setdefault(group.title or "", []).append(_argument(action))
    return Command(name, about, groups, commands)


def _argument(action: argparse.Action) -> Argument:
    value = "" if action.nargs == 0 else str(action.metavar or action.dest)
    text = (action.help or "") % {"default": action.default}
    choices = tuple(map(str, action.choices or ()))
    return Argument(tuple(action.option_strings), value, text, choices, action.nargs == "*")


def _program(name: str, parser: argparse.ArgumentParser) -> Command:
    return _command(name, parser, parser.description or "")


SERVICE: Final = _program(cli.PROGRAM, cli.parser(RUNTIME_DIR))
CONTROL: Final = _program(ctl.PROGRAM, ctl.parser())
PROGRAMS: Final = (SERVICE, CONTROL)

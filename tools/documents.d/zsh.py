"""Completion for zsh."""

from __future__ import annotations

import re
from collections.abc import Iterable

from keys import all_names
from programs import Argument, Command

DISKS = """
_nbd_reactorctl_disks() {
  local -a disks
  disks=(${(f)"$($service $socket --timeout 1 list 2>/dev/null </dev/null |
    sed -n '2,$s/ .*//p')"})
  compadd -a disks
}
"""

COMMANDS = """
local curcontext=$curcontext state line
local -a socket commands
typeset -A opt_args
_arguments -C \\
{options} \\
  '1:COMMAND:->command' \\
  '*::argument:->argument' && return
(( ${{+opt_args[--socket]}} )) && socket=(--socket ${{(Q)opt_args[--socket]}})
case $state in
  command)
    commands=(
{described}
    )
    _describe command commands
    ;;
  argument)
    case $line[1] in
{cases}
    esac
    ;;
esac
"""


def completion(program: Command) -> str:
    """Return the script."""
    head = f"#compdef {program.name}\n# written by tools/documents\n"
    options = _specs(program.options, "  ")
    if not program.commands:
        return f"{head}_arguments \\\n{options}\n"
    described = "\n".join(
        f"      {_quoted(each.name + ':' + _short(each.help))}" for each in program.commands
    )
    cases = "\n".join(_case(each) for each in program.commands)
    return head + DISKS + COMMANDS.format(options=options, described=described, cases=cases)


def _case(command: Command) -> str:
    specs = _specs([*command.options, *command.places], "          ")
    return f"      {command.name})\n        _arguments \\\n{specs} ;;"


def _specs(arguments: Iterable[Argument], indent: str) -> str:
    return " \\\n".join(f"{indent}{spec}" for each in arguments for spec in _spec(each))


def _spec(argument: Argument) -> Iterable[str]:
    action = _action(argument)
    if not argument.flags:
        yield _quoted(f"{'*' if argument.repeated else ''}:{argument.metavar}:{action}")
    equals = "=" if argument.metavar else ""  # --option=value is right too
    value = f":{argument.metavar}:{action}" if argument.metavar else ""
    about = re.sub(r"([\[\]:\\])", r"\\\1", argument.short)
    for flag in argument.flags:
        yield _quoted(f"{flag}{equals}[{about}]{value}")


def _action(argument: Argument) -> str:
    if argument.choices:
        return f"({' '.join(argument.choices)})"
    if argument.kind == "keys":
        return f"compadd -S '' -- {' '.join(name + '=' for name in all_names())}"
    actions = {"file": "_files", "directory": "_files -/", "disk": "_nbd_reactorctl_disks"}
    return actions.get(argument.kind, " ")


def _short(text: str) -> str:
    return re.split(r"[;:(]", text)[0].strip()


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"

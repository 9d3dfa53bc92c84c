"""Completion for fish."""

from __future__ import annotations

import re
from collections.abc import Iterable

from keys import all_names
from programs import Argument, Command

DISKS = """
function __nbd_reactorctl_disks
    set -l words (commandline -opc)
    set -l socket
    if set -l at (contains -i -- --socket $words)
        set socket --socket $words[(math $at + 1)]
    end
    $words[1] $socket --timeout 1 list 2>/dev/null </dev/null | sed -n '2,$s/ .*//p'
end

function __nbd_reactorctl_place -a command least most
    set -l words (commandline -opc)
    set -l at (contains -i -- $command $words); or return
    set -e words[1..$at]
    set -l count (count (string match -v -- '-*' $words))
    test $count -ge $least -a $count -le $most
end
"""


def completion(program: Command) -> str:
    """Return the script."""
    start = f"complete -c {program.name}"
    lines = [f"# fish completion for {program.name}; written by tools/documents"]
    if program.commands:
        lines.append(DISKS)
    lines.append(f"{start} -f")
    lines += [f"{start}{_option(each)}" for each in program.options]
    names = " ".join(command.name for command in program.commands)
    for command in program.commands:
        about = _quoted(re.split(r"[;:(]", command.help)[0].strip())
        none = f"not __fish_seen_subcommand_from {names}"
        lines.append(f"{start} -n {_quoted(none)} -a {command.name} -d {about}")
        lines += [f"{start}{each}" for each in _places(command)]
    return "\n".join(lines) + "\n"


def _option(argument: Argument) -> str:
    text = ""
    for flag in argument.flags:
        text += f" -l {flag[2:]}" if flag.startswith("--") else f" -s {flag[1:]}"
    if argument.metavar:
        text += {"file": " -r -F", "directory": " -x -a '(__fish_complete_directories)'"}.get(
            argument.kind, f" -x -a {_quoted(' '.join(argument.choices))}"
        )
    return f"{text} -d {_quoted(argument.short)}"


def _places(command: Command) -> Iterable[str]:
    for place, argument in enumerate(command.places):
        most = 99 if argument.repeated else place
        there = f" -n '__nbd_reactorctl_place {command.name} {place} {most}'"
        if argument.kind == "disk":
            yield f"{there} -a '(__nbd_reactorctl_disks)'"
        elif argument.kind == "keys":
            yield f"{there} -a {_quoted(' '.join(name + '=' for name in all_names()))}"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

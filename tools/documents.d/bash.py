"""Completion for bash."""

from __future__ import annotations

from collections.abc import Iterable

from keys import all_names
from programs import Argument, Command

HEAD = """\
# bash completion for {name}; written by tools/documents
"""

DISKS = """\

{function}_disks() {{
    local index path socket=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        if [[ ${{COMP_WORDS[index]}} == --socket ]]; then
            [[ ${{COMP_WORDS[index + 1]}} == = ]] && ((index++))
            path=${{COMP_WORDS[index + 1]}} # as typed; it must not be evaluated
            path=${{path//[\\\\\\"\\']/}}
            socket=(--socket "$path")
        fi
    done
    "$1" "${{socket[@]}}" --timeout 1 list 2>/dev/null </dev/null | sed -n '2,$s/ .*//p'
}}
"""

BODY = """\

{function}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD - 1]}}
    COMPREPLY=()
    if [[ $word == = ]]; then # --option=value is three words
        word=
    elif [[ $before == = ]]; then
        before=${{COMP_WORDS[COMP_CWORD - 2]}}
    fi
    case $before in
{values}
    esac
"""

WORDS = """\
    mapfile -t COMPREPLY < <(compgen -W '{words}' -- "$word")
}}

complete -F {function} {name}
"""

# Which command stands there already, and how many arguments after it.
COMMANDS = """\
    local index command='' places=0
    for ((index = 1; index < COMP_CWORD; index++)); do
        case ${{COMP_WORDS[index]}} in
            {valued})
                [[ ${{COMP_WORDS[index + 1]}} == = ]] && ((index++))
                ((index++))
                ;;
            -*) ;;
            *) [[ $command ]] && ((++places)) || command=${{COMP_WORDS[index]}} ;;
        esac
    done
    [[ $before == = && $before != "${{COMP_WORDS[COMP_CWORD - 1]}}" ]] && return
    if [[ $word != -* ]]; then
        case $command:$places in
            :0) mapfile -t COMPREPLY < <(compgen -W '{commands}' -- "$word") ;;
{places}
        esac
        return
    fi
"""


def completion(program: Command) -> str:
    """Return the script."""
    function = "_" + program.name.replace("-", "_")
    options = [*program.options, *(each for c in program.commands for each in c.options)]
    flags = " ".join(dict.fromkeys(flag for each in program.options for flag in each.flags))
    text = HEAD.format(name=program.name)
    if program.commands:
        text += DISKS.format(function=function)
    text += BODY.format(function=function, values="\n".join(_values(options)))
    if program.commands:
        text += COMMANDS.format(
            valued=" | ".join(_valued(options)),
            commands=" ".join(each.name for each in program.commands),
            places="\n".join(_places(program, function)),
        )
    return text + WORDS.format(function=function, name=program.name, words=flags)


def _valued(options: Iterable[Argument]) -> list[str]:
    return [*dict.fromkeys(flag for each in options if each.metavar for flag in each.flags)]


def _values(options: Iterable[Argument]) -> Iterable[str]:
    lines = {}
    for each in options:
        if each.metavar:
            lines[" | ".join(each.flags)] = _value(each)
    return [f"        {flags}) {value}return ;;" for flags, value in lines.items()]


def _value(argument: Argument) -> str:
    if argument.choices:
        words = " ".join(argument.choices)
        return f"""mapfile -t COMPREPLY < <(compgen -W '{words}' -- "$word"); """
    action = {"file": "-f", "directory": "-d"}.get(argument.kind)
    if action is None:
        return ""
    return f"""compopt -o filenames; mapfile -t COMPREPLY < <(compgen {action} -- "$word"); """


def _places(program: Command, function: str) -> Iterable[str]:
    for command in program.commands:
        for place, argument in enumerate(command.places):
            pattern = f"{command.name}:{'*' if argument.repeated else place}"
            if argument.kind == "disk":
                words = f'"$({function}_disks "$1")"'
                yield f"            {pattern}) {_filled(words)} ;;"
            elif argument.kind == "keys":
                words = "'" + " ".join(f"{name}=" for name in all_names()) + "'"
                yield f"            {pattern}) compopt -o nospace; {_filled(words)} ;;"


def _filled(words: str) -> str:
    return f'mapfile -t COMPREPLY < <(compgen -W {words} -- "$word")'

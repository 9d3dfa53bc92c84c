"""Completions in real shells, as a person who presses the tab key gets them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import commands
from tests.running import RunningService

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deploy/completions"
DISKS = "disks: {ram0: {backend: malloc, size: 1MiB}, other: {backend: 'null'}}"


def shell(*command: str, cwd: Path) -> list[str]:
    """Return what the shell prints, line by line; it must not complain."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PATH": path, "HOME": str(cwd), "TERM": "dumb"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    return [line.rstrip() for line in done.stdout.splitlines()]


def bash(line: str, cwd: Path) -> list[str]:
    """Complete as bash does: words are parted at spaces and at each `=`."""
    program = shlex.split(line)[0]
    words = [w for part in shlex.split(line) for w in part.replace("=", " = ").split(" ") if w]
    if line.endswith((" ", "=")):
        words.append("")
        if line.endswith("="):
            words.pop()
    script = f"""
        set -u
        compopt() {{ :; }} # outside of a completion there is nothing to tell
        . {shlex.quote(str(FOLDER / "bash" / program))}
        COMP_WORDS=({shlex.join(words)})
        COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        set +u
        function=$(complete -p {program} | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        "$function" {program} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD - 1]}}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return [word for word in shell("bash", "--norc", "-c", script, cwd=cwd) if word]


def fish(line: str, cwd: Path) -> list[str]:
    program = shlex.split(line)[0]
    script = f"source {FOLDER}/fish/{program}.fish; complete -C {shlex.quote(line)}"
    return [word.split("\t")[0] for word in shell("fish", "--no-config", "-c", script, cwd=cwd)]


#: What is typed, and the completions of it.
CASES = {
    "nbd-reactor --mo": ["--mode"],
    "nbd-reactor --mode ": ["adaptive", "interrupt", "poll"],
    "nbd-reactor --log-level err": ["error"],
    "nbd-reactor --config di": ["disks.yaml"],
    "nbd-reactor --runtime-dir r": ["run dir/"],
    "nbd-reactorctl re": ["reload", "remove", "resize"],
    "nbd-reactorctl --json re": ["reload", "remove", "resize"],
    "nbd-reactorctl --soc": ["--socket"],
    "nbd-reactorctl start x bac": ["backend="],
}


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A folder with something to complete."""
    folder = tmp_path / "here"
    (folder / "run dir").mkdir(parents=True)
    (folder / "disks.yaml").touch()
    return folder


@pytest.mark.parametrize("line", CASES)
def test_bash_completes(line: str, here: Path) -> None:
    # With `compopt -o filenames` bash itself adds the slash to a directory.
    assert sorted(bash(line, here)) == [word.rstrip("/") for word in CASES[line]]


@pytest.mark.parametrize("script", [*(FOLDER / "bash").iterdir()], ids=lambda path: path.name)
def test_bash_scripts_are_sound(script: Path) -> None:
    commands.run("shellcheck", "--shell=bash", str(script))


def test_bash_evaluates_nothing_that_is_typed(here: Path) -> None:
    assert bash("nbd-reactorctl --socket '$(>made)' show ", here) == []
    assert not (here / "made").exists()


def test_bash_completes_behind_an_equals_sign(here: Path) -> None:
    assert bash("nbd-reactor --mode=po", here) == ["poll"]
    assert bash("nbd-reactor --mode=", here) == ["adaptive", "poll", "interrupt"]


@pytest.mark.parametrize("line", CASES)
def test_fish_completes(line: str, here: Path) -> None:
    assert sorted(fish(line, here)) == CASES[line]


@pytest.mark.parametrize("complete", [bash, fish])
def test_disks_of_a_running_service(
    complete: Callable[[str, Path], list[str]],
    here: Path,
    service: Callable[..., RunningService],
) -> None:
    socket = service(DISKS).rpc_socket
    before = f"nbd-reactorctl --socket {shlex.quote(str(socket))}"
    for command in ("show", "stop", "start", "remove", "resize"):
        assert sorted(complete(f"{before} {command} ", here)) == ["other", "ram0"]
    assert complete(f"{before} show ra", here) == ["ram0"]


@pytest.mark.parametrize("complete", [bash, fish])
def test_silence_where_no_service_is(
    complete: Callable[[str, Path], list[str]], here: Path
) -> None:
    assert complete(f"nbd-reactorctl --socket {here}/rpc.sock show ", here) == []


#: A zsh with its completions in a terminal of its own. ^X shows the line as the tab key left it.
ZSH = """
zmodload zsh/zpty
zpty z zsh -f -i
zpty -w z "PS1=; stty -echo; fpath=({folder} \\$fpath); autoload -Uz compinit; compinit -u -D"
zpty -w z "show() {{ print -r -- \"@@\\$BUFFER@@\" }}; zle -N show; bindkey '^X' show"
zpty -w z "bindkey '^I' complete-word; unset zle_bracketed_paste; print BEGIN'-IT'"
zpty -r -m z discarded '*BEGIN-IT*'
zpty -n -w z {line}$'\\t\\C-x'
zpty -r -m z shown '*@@*@@*'
zpty -d z
print -r -- ${{${{shown%@@*}}##*@@}}
"""


def zsh(line: str, here: Path) -> list[str]:
    """Return the line as it is after the tab key."""
    script = ZSH.format(folder=shlex.quote(str(FOLDER / "zsh")), line=shlex.quote(line))
    return shell("zsh", "-f", "-c", script, cwd=here)


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("nbd-reactor --mo", "nbd-reactor --mode="),
        ("nbd-reactor --mode po", "nbd-reactor --mode poll "),
        ("nbd-reactor --mode=po", "nbd-reactor --mode=poll "),
        ("nbd-reactor --config di", "nbd-reactor --config disks.yaml "),
        ("nbd-reactor --runtime-dir r", "nbd-reactor --runtime-dir run\\ dir/"),
        ("nbd-reactorctl relo", "nbd-reactorctl reload "),
        ("nbd-reactorctl start x bac", "nbd-reactorctl start x backend="),
    ],
)
def test_zsh_completes(line: str, completed: str, here: Path) -> None:
    assert zsh(line, here) == [completed.rstrip()]


def test_zsh_completes_disks(here: Path, service: Callable[..., RunningService]) -> None:
    line = f"nbd-reactorctl --socket {service(DISKS).rpc_socket} show "
    assert zsh(f"{line}ra", here) == [f"{line}ram0"]
    typed = "nbd-reactorctl --socket '$(>made)' show ra"
    assert zsh(typed, here) == [typed]
    assert not (here / "made").exists()
    silent = f"nbd-reactorctl --socket {here}/rpc.sock show ra"
    assert zsh(silent, here) == [silent]

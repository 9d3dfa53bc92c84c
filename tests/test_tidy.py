"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.readme import commands

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LINE_MAX = 100
FUNCTION_MAX = 70
FILE_MAX = 500

PRAGMA = re.compile(r"  # (noqa|type: ignore).*")

#: What has one place, and where that is.
OWNERS = {
    r"^\s*(import|from) zmq\b": "reactor/bus.py",
    r"^\s*(import|from) yaml\b": "reactor/config/",
    r"^\s*(import|from) caio\b": "backends/uring.py",
    r"\bselect\.epoll\(": "reactor/loop.py",
    r"\bAF_NETLINK\b": "reactor/attach/",
}

#: What tells of a workplace instead of the project.
FORBIDDEN = [
    r"(?<![\w.])/(home|work)/\w",  # a path on somebody's machine
    r"\bissues? #?\d",
    r"(?<![\w&\"'])#\d+\b(?![\w;])",  # in quotes it is a colour
    r"\b(TODO|FIXME|XXX)\b",
]


def tracked() -> list[Path]:
    """The project's files, also those that are not committed yet; or those of an sdist."""
    listed = ROOT / "nbd_reactor.egg-info/SOURCES.txt"
    if not (ROOT / ".git").exists() and listed.is_file():
        names = listed.read_text().splitlines()
        made = re.compile(r"setup\.cfg|PKG-INFO|[^/]+\.egg-info/.*")
        return [ROOT / name for name in names if not made.fullmatch(name)]
    safe = ["-c", "safe.directory=*"]  # root may test another user's checkout
    command = ["git", *safe, "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in listing.stdout.splitlines()]
    return [path for path in paths if path.is_file()]


def first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(200).decode(errors="replace")


def python_files() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".py" or "python" in shebang(p)]


def shell_files() -> list[Path]:
    return [p for p in tracked() if p.suffix == ".sh" or re.search(r"\b(ba)?sh\b", shebang(p))]


def shebang(path: Path) -> str:
    line = first_line(path)
    return line if line.startswith("#!") else ""


def text_files() -> list[Path]:
    return [path for path in tracked() if b"\0" not in path.read_bytes()]


def show(path: Path) -> str:
    return str(path.relative_to(ROOT))


def run(*command: str) -> None:
    done = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_imports_run_downwards_only() -> None:
    run(str(BIN / "lint-imports"), "--no-cache")


def test_every_module_has_its_layer() -> None:
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = " | ".join(contract["contracts"][0]["layers"]).split(" | ")
    own = {path.stem for path in (ROOT / "reactor").glob("[!_]*") if path.suffix != ".typed"}
    assert {f"reactor.{name}" for name in own} == {name for name in layers if name != "backends"}


@pytest.mark.parametrize("pattern", OWNERS)
def test_what_is_intricate_has_one_place(pattern: str) -> None:
    users = {show(path) for path in sources() if re.search(pattern, path.read_text(), re.MULTILINE)}
    assert not [user for user in users if not user.startswith(OWNERS[pattern])]


def test_backends_are_found_through_the_registry() -> None:
    modules = (ROOT / "backends").glob("*.py")
    storage = {f"backends.{m.stem}" for m in modules if "\nBACKEND" in m.read_text()}
    assert storage
    wrong = [
        f"{show(path)}: {module}"
        for path in (ROOT / "reactor").rglob("*.py")
        for module in imported(path)
        if module in storage
    ]
    assert not wrong


def sources() -> list[Path]:
    return sorted([*(ROOT / "reactor").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_functions_and_files_are_short() -> None:
    wrong = []
    for path in python_files():
        text = path.read_text()
        if (lines := len(text.splitlines())) > FILE_MAX:
            wrong.append(f"{show(path)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > FUNCTION_MAX:
                    wrong.append(f"{show(path)}: {node.name} has {lines} lines")
    assert not wrong, "\n".join(wrong)


def test_lines_are_short() -> None:
    code = {*python_files(), *shell_files()}
    wrong = [
        f"{show(path)}:{number}"
        for path in code
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(PRAGMA.sub("", line)) > LINE_MAX
    ]
    assert not wrong


def test_the_linter_has_no_complaint() -> None:
    files = [show(path) for path in python_files()]
    run(str(BIN / "ruff"), "check", "--no-cache", *files)
    run(str(BIN / "ruff"), "format", "--no-cache", "--check", *files)


@pytest.mark.timeout(300)
def test_types_are_sound() -> None:
    run(str(BIN / "mypy"))


def test_shell_scripts_are_sound() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    run("shellcheck", *(show(path) for path in shell_files()))


def test_shell_scripts_stop_at_the_first_error() -> None:
    """What runs under bash; BusyBox and init scripts must go on to report."""
    bash = [path for path in shell_files() if "bash" in shebang(path)]
    assert not [show(path) for path in bash if "set -euo pipefail" not in path.read_text()]


def test_nothing_speaks_of_a_workplace() -> None:
    this = Path(__file__)
    wrong = [
        f"{show(path)}:{number}: {line.strip()}"
        for path in text_files()
        if path != this
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if any(re.search(pattern, line) for pattern in FORBIDDEN)
    ]
    assert not wrong, "\n".join(wrong)


def test_documents_that_are_named_exist() -> None:
    """A document that is not part of the project helps no reader of it."""
    names = {path.name for path in tracked()} | {"proto.md"}  # the NBD specification
    wrong = [
        f"{show(path)}: {name}"
        for path in text_files()
        for name in re.findall(r"(?<![\w./:-])[\w-]+\.md\b", path.read_text())
        if name not in names
    ]
    assert not wrong


@pytest.mark.parametrize("path", sorted(ROOT.glob("deploy/**/*.md")) + sorted(ROOT.glob("*.md")))
def test_links_to_files_lead_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text())
    assert not [link for link in links if not (path.parent / link).exists()]


def test_every_command_of_the_readme_is_run_somewhere() -> None:
    """Blocks marked `run` by the kernel tests, the others by the CI script."""
    ci = (ROOT / ".ci/run").read_text()
    installing = (".venv/bin/pip install .", "python3 -m venv .venv", ". .venv/bin/activate")
    others = [line for line in commands(run=False) if line not in installing]
    assert others
    assert not [line for line in others if line not in ci]
    assert commands(run=True)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_examples_have_no_problems(path: Path) -> None:
    run(sys.executable, "-m", "reactor", "--check", "--config", str(path))

"""The house rules that a machine can hold."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LINE_MAX = 100
FUNCTION_MAX = 70
FILE_MAX = 500

#: Who alone may import what: each has one place.
OWNERS = {
    "zmq": ["reactor/bus.py"],
    "select": ["reactor/loop.py"],
    "yaml": ["reactor/config/"],
    "caio": ["backends/uring.py"],
    "fcntl": ["reactor/attach/", "reactor/control/runtime.py", "backends/file.py"],
}

#: What tells of a workplace instead of the project.
FORBIDDEN = [
    r"(?<![\w.])/(home|work)/\w",  # a path on somebody's machine
    r"\bissues? #?\d",
    r"(?<![\w&])#\d+\b(?![\w;])",
    r"\b(TODO|FIXME|XXX)\b",
]


def tracked() -> list[Path]:
    """The project's files, also those that are not committed yet."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
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


def test_every_heavy_import_has_one_owner() -> None:
    wrong = [
        f"{show(path)}: {module}"
        for path in sources()
        for module in imported(path)
        if module in OWNERS and not show(path).startswith(tuple(OWNERS[module]))
    ]
    assert not wrong


def test_backends_are_found_through_the_registry() -> None:
    names = {path.stem for path in (ROOT / "backends").glob("*.py")}
    storage = names - {"__init__", "api", "registry", "emulation", "uring"}
    wrong = [
        f"{show(path)}: {module}"
        for path in sources()
        for module in imported(path, whole=True)
        if module in {f"backends.{name}" for name in storage}
    ]
    assert not wrong


def sources() -> list[Path]:
    return sorted([*(ROOT / "reactor").rglob("*.py"), *(ROOT / "backends").rglob("*.py")])


def imported(path: Path, *, whole: bool = False) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (modules if whole else {module.partition(".")[0] for module in modules})


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
        if len(line) > LINE_MAX
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
    names = {path.name for path in tracked()}
    wrong = [
        f"{show(path)}: {name}"
        for path in text_files()
        for name in re.findall(r"(?<![\w./:-])[\w-]+\.md\b", path.read_text())
        if name not in names
    ]
    assert not wrong


@pytest.mark.parametrize("path", ["README.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(path: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / path).read_text())
    assert not [link for link in links if not (ROOT / link).exists()]

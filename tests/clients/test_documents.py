"""What tools/documents writes: that it is fresh, complete, and good for those who read it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from reactor import cli, ctl
from tests.commands import run

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "deploy/man").iterdir())


def test_nothing_is_stale() -> None:
    run(sys.executable, str(ROOT / "tools/documents.d"), "--check")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_man_has_no_warnings(page: Path) -> None:
    shown = subprocess.run(
        ["man", "--local-file", "--warnings", "-E", "UTF-8", page], capture_output=True, check=True
    )
    assert shown.stderr.decode() == ""
    assert b"SEE ALSO" in re.sub(rb".\x08", b"", shown.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_mandoc_has_no_complaints(page: Path) -> None:
    assert run("mandoc", "-T", "lint", str(page)) == ""


def test_pages_know_each_other() -> None:
    names = {page.name for page in PAGES}
    text = "".join(page.read_text() for page in PAGES)
    ours = r"^\.BR (nbd\S*reactor\S*|disks\.yaml) \((\d)\)"
    referred = {f"{name}.{n}" for name, n in re.findall(ours, text, re.MULTILINE)}
    assert {name.replace("\\", "") for name in referred} == names


@pytest.mark.parametrize(
    ("help_text", "page"),
    [
        (cli.parser().format_help(), "nbd-reactor.8"),
        (ctl.parser().format_help(), "nbd-reactorctl.8"),
    ],
    ids=["nbd-reactor", "nbd-reactorctl"],
)
def test_pages_have_every_option(help_text: str, page: str) -> None:
    text = (ROOT / "deploy/man" / page).read_text().replace("\\-", "-")
    described = set(re.findall(r"^\.TP\n(.*)", text, re.MULTILINE))
    heads = " ".join(described)
    options = set(re.findall(r"--[a-z-]+", help_text))
    assert {"--version", "--help"} < options
    assert not [option for option in options if f"\\fB{option}\\fR" not in heads]


def rows(table: str) -> Iterator[list[str]]:
    """The cells of a table of the README, below its head."""
    text = (ROOT / "README.md").read_text()
    lines = text[text.index(table) :].splitlines()[2:]
    for line in lines:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("|").split(" | ")]


def test_the_readme_has_every_option_with_its_default() -> None:
    parser = cli.parser()
    known = {
        action.option_strings[-1]: action
        for action in parser._actions
        if action.option_strings[-1] not in ("--help", "--version")
    }
    told = {}
    for cells in rows("| option | meaning | default |"):
        names = re.findall(r"--[a-z-]+", cells[0])
        told |= dict(
            zip(
                names,
                [cells[-1].strip("|` ")]
                if len(names) == 1
                else [each.strip("` ") for each in cells[-1].split(",")],
                strict=True,
            )
        )
    assert set(told) == set(known)
    for name, action in known.items():
        if action.choices:
            assert told[name] == action.default
        elif action.nargs == 0:
            assert told[name] in ("", "|", "off", "serve the others")

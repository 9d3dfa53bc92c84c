"""tools/setup: what it keeps of a virtual environment, and what it makes anew."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench import ROOT

#: Needs nothing from the network: it builds itself.
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "small"
version = "1.0"
"""
BACKEND = """
from zipfile import ZipFile
METADATA = "Metadata-Version: 2.1\\nName: small\\nVersion: 1.0\\n"
def get_requires_for_build_editable(settings=None):
    return []
def build_editable(folder, settings=None, metadata=None):
    name = "small-1.0-py3-none-any.whl"
    with ZipFile(f"{folder}/{name}", "w") as wheel:
        wheel.writestr("small-1.0.dist-info/METADATA", METADATA)
        wheel.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("small-1.0.dist-info/RECORD", "")
    return name
"""


def checkout(folder: Path) -> Path:
    (folder / "tools").mkdir(parents=True)
    (folder / "reactor").mkdir()
    shutil.copy(ROOT / "tools/setup", folder / "tools/setup")
    (folder / "reactor/__init__.py").write_text("")
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "backend.py").write_text(BACKEND)
    return folder


def setup(folder: Path) -> str:
    """Run it; returns what it said."""
    path = f"{Path(sys.executable).resolve().parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [folder / "tools/setup"],
        capture_output=True,
        text=True,
        check=False,
        timeout=110,
        env={**os.environ, "PATH": path},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_else_is_installed_is_kept(tmp_path: Path) -> None:
    pytest.importorskip("ensurepip")
    folder = checkout(tmp_path / "here")
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)  # by its user
    other = folder / ".venv/other"
    other.touch()
    assert "installing" in setup(folder)
    assert setup(folder) == ""
    (folder / "reactor/__init__.py").write_text("changed = True")
    assert "installing" in setup(folder)
    assert other.exists()


def test_what_cannot_run_or_was_moved_is_made_anew(tmp_path: Path) -> None:
    pytest.importorskip("ensurepip")
    folder = checkout(tmp_path / "here")
    assert "making .venv" in setup(folder)
    moved = folder.rename(tmp_path / "there")
    assert "making .venv" in setup(moved)
    assert str(moved) in (moved / ".venv/bin/pip").read_text()
    (moved / ".venv/bin/python").unlink()
    assert "making .venv" in setup(moved)
    assert setup(moved) == ""

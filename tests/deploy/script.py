"""The role's scripts as modules."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILES = Path(__file__).parents[2] / "deploy/ansible/roles/nbd_reactor/files"


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return one of them, read anew."""
    specification = importlib.util.spec_from_file_location(name, FILES / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # else the collection would hold it
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module

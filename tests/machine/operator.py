"""The operator's side: wheels, an inventory, and ansible-playbook run here against the machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from tests.machine.machine import Machine

ROOT = Path(__file__).parents[2]
COLLECTION = ROOT / "deploy/ansible"
PLAY_SECONDS = 1500  # a deadline: each step takes seconds on an emulated CPU, more under load
VERSION = re.compile(r'^__version__ = ".*"$', re.MULTILINE)


class Operator:
    """Has wheels of two versions and what they need; the machine asks no package index."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self.wheels = folder / "wheels"
        self.old = self._build("1.0.1", "--wheel-dir", self.wheels)
        self.new = self._build("1.0.2", "--no-deps", "--wheel-dir", folder / "new")
        self.variables: dict[str, Any] = {"nbd_reactor_wheels": str(self.wheels)}

    def play(self, playbook: str, *arguments: str, fails: bool = False, **extra: object) -> str:
        """Run a playbook and return what it said. Its exit status must be as `fails` says."""
        inventory = self.folder / "inventory.yml"
        host = {
            "ansible_ssh_common_args": f"-F {self.machine.ssh_config}",
            "ansible_ssh_args": "",  # of connections, one as in that file
            "ansible_pipelining": True,
            "ansible_become": False,  # root already; the machine has no sudo
            "ansible_python_interpreter": "/usr/bin/python3",
            **self.variables,
            **extra,
        }
        inventory.write_text(yaml.safe_dump({"nbd_reactor": {"hosts": {"machine": host}}}))
        done = subprocess.run(
            [
                *(Path(sys.executable).parent / "ansible-playbook", "-i", inventory, "--diff"),
                *(COLLECTION / f"playbooks/{playbook}.yml", *arguments),
            ],
            env=os.environ
            | {
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "ANSIBLE_CONFIG": str(COLLECTION / "ansible.cfg"),
                "ANSIBLE_HOME": str(self.folder / "ansible"),
                "ANSIBLE_NOCOLOR": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PLAY_SECONDS,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + done.stderr

    def _build(self, version: str, *arguments: str | Path) -> Path:
        """Build a wheel of this checkout with another version number, and return it."""
        source = self.folder / f"source-{version}"
        skipped = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "tests")
        shutil.copytree(ROOT, source, ignore=skipped)
        program = source / "reactor/__init__.py"
        text, found = VERSION.subn(f'__version__ = "{version}"', program.read_text())
        assert found == 1
        program.write_text(text)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", *arguments, source]
        subprocess.run(pip, check=True, timeout=300)
        (wheel,) = Path(arguments[-1]).glob(f"nbd_reactor-{version}-*.whl")
        return wheel


def changes(output: str) -> int:
    """Return how many tasks changed something."""
    (count,) = re.findall(r"^machine +:.* changed=(\d+)", output, re.MULTILINE)
    return int(count)

"""Brings this checkout onto the machine, by hand and with the paths of deploy/."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.machine.machine import Machine

ROOT = Path(__file__).parents[2]
RELEASE = "/opt/nbd-reactor/releases/0-test"
DROP_IN = r"/etc/systemd/system/dev-disk-by\x2dnbd-.device.d/nbd-reactor.conf"


def deploy(machine: Machine, folder: Path) -> None:
    """Install a release, the units and the rules; `folder` is for the wheels."""
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", str(wheels), "."]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    machine.copy([wheels], "/root")
    # Debian's own pip, run where it lies: ensurepip takes a minute on an emulated CPU.
    machine.run(
        f"python3 -m venv --without-pip {RELEASE} && "
        f"PYTHONPATH=$(echo /usr/share/python-wheels/pip-*.whl) {RELEASE}/bin/python -m pip"
        " install --quiet --no-index --find-links /root/wheels --no-compile nbd-reactor && "
        "ln -s releases/0-test /opt/nbd-reactor/current && rm -r /root/wheels && "
        "cp -rs /opt/nbd-reactor/current/share/{bash-completion,fish,man,zsh} /usr/local/share/",
        timeout=300,
    )
    systemd = ROOT / "deploy/systemd"
    machine.copy(sorted(systemd.glob("*.service")), "/etc/systemd/system")
    machine.copy([ROOT / "deploy/udev/60-nbd-reactor.rules"], "/etc/udev/rules.d")
    machine.write(DROP_IN, (systemd / "by-nbd.device.conf").read_text())
    machine.run("systemctl daemon-reload && udevadm control --reload")

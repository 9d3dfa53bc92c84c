"""The machine itself: what all other tests here stand on."""

from __future__ import annotations

import os
from pathlib import Path

from tests.machine.machine import Machine


def test_files_and_commands_reach_it(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "copied").write_text("here")
    machine.copy([tmp_path / "copied"], "/root/given")
    machine.write("/root/given/written", "there")
    assert machine.run("cat /root/given/copied /root/given/written; id -u") == "herethere0"
    assert not machine.succeeds("test -e /root/nothing")
    machine.run("rm -r /root/given")


def test_it_is_a_whole_system_with_the_real_driver(machine: Machine) -> None:
    assert machine.run("cat /proc/1/comm; systemctl is-system-running") == "systemd\nrunning"
    assert machine.run("modinfo -F name nbd && udevadm --version && findmnt -no FSTYPE /") != ""


def test_it_has_no_way_out(machine: Machine) -> None:
    assert "MACHINE_SSH" in os.environ
    assert not machine.succeeds("timeout 3 bash -c '</dev/tcp/10.0.2.2/22'", timeout=30)

"""Runs `nbd-reactor --demo`, checks its disks by real I/O, and serves on.

The runtime directory is this run's own, so no other service's disk can be written to.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from reactor.demo.disks import DeviceDisk, Disk, SocketDisk
from reactor.demo.exercise import AREA_BYTES, exercise
from reactor.errors import ProtocolError, ReactorError, reason
from reactor.rpc_client import RpcClient

READY_SECONDS: Final = 60.0
STOP_SECONDS: Final = 60.0


def open_disk(disk: dict[str, Any], pattern: memoryview) -> Disk:
    """Open a disk by its best address: the device, else its socket."""
    if disk["device"]:
        return DeviceDisk(disk["device"], pattern)
    return SocketDisk(socket_path(disk), pattern)


def socket_path(disk: dict[str, Any]) -> str:
    """Return the path of the unix socket that serves the disk."""
    return str(disk["listen"][0]).removeprefix("unix:")


def show(disks: Sequence[dict[str, Any]]) -> None:
    """Print where each disk is, what it did under I/O, and how to go on."""
    pattern = memoryview(random.randbytes(AREA_BYTES))
    for entry in disks:
        addresses = [entry["device"]] if entry["device"] else []
        say(f"\ndisk {entry['name']}: {', '.join([*addresses, *entry['listen']])}")
        disk = open_disk(entry, pattern)
        try:
            for line in exercise(disk):
                say(line)
        finally:
            disk.close()
        say(f"      {AREA_BYTES >> 20} MiB written, every byte read is as written")
    path = socket_path(disks[0])
    say(f"\ntry: nbdinfo 'nbd+unix:///?socket={path}'")
    if disks[0]["device"]:
        say(f"     mkfs.ext4 {disks[0]['device']} && mount {disks[0]['device']} /mnt")
    else:
        say("no /dev/nbdN here: that needs root and the kernel's nbd driver (modprobe nbd)")


def say(line: str) -> None:
    """Show a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def online_disks(service: subprocess.Popen[bytes], rpc: Path) -> list[dict[str, Any]]:
    """Wait until every disk of the service is up; raises ReactorError when one cannot."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        if service.poll() is not None:
            raise ReactorError(f"the service ended with status {service.returncode}")
        disks = known_disks(rpc)
        for disk in disks:
            if disk["state"] == "failed":
                raise ReactorError(f"disk {disk['name']}: {disk['reason']}")
        if disks and all(disk["state"] == "online" for disk in disks):
            return disks
        time.sleep(0.05)
    raise ReactorError(f"the disks were not up after {READY_SECONDS:.0f} s")


def known_disks(rpc: Path) -> list[dict[str, Any]]:
    """Return what the service says of its disks; nothing while it does not listen yet."""
    try:
        client = RpcClient(rpc, READY_SECONDS)
    except ReactorError:
        return []
    with client:
        disks: list[dict[str, Any]] = client.call("reactor_get_disks")
        return disks


def stop(service: subprocess.Popen[bytes]) -> int:
    """Ask the service to stop, a second time when it is interrupted meanwhile."""
    for _ in range(2):
        service.terminate()
        try:
            return service.wait(STOP_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            continue
    service.kill()
    return service.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="tools/demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="stop after the report")
    once = parser.parse_args(arguments).once
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="nbd-reactor-demo-") as folder:
        command = [sys.executable, "-m", "reactor", "--demo", "--runtime-dir", folder]
        # Its own session: Ctrl-C is for this process, which then stops the service in order.
        service = subprocess.Popen(command, start_new_session=True)
        try:
            show(online_disks(service, Path(folder, "rpc.sock")))
            if not once:
                say("serving until Ctrl-C")
                raise ReactorError(f"the service ended with status {service.wait()}")
        except KeyboardInterrupt:
            say("")
        except (ReactorError, ProtocolError, OSError) as error:
            sys.stderr.write(f"tools/demo: {reason(error)}\n")
            stop(service)
            return 1
        except BaseException:
            stop(service)
            raise
        return stop(service)


if __name__ == "__main__":
    sys.exit(main())

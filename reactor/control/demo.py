"""The disks of `nbd-reactor --demo`: one in memory, one in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from reactor.control.service import DiskStatus
from reactor.log import tell
from reactor.spec import Address, DiskSpec

DEMO_BYTES: Final = 256 << 20
CAP_SYS_ADMIN: Final = 21  # include/uapi/linux/capability.h


def demo_disks(runtime_dir: Path) -> tuple[DiskSpec, ...]:
    """Return two disks, on devices where user and kernel allow it, and on sockets."""
    device = "auto" if _can_attach() else None
    options: dict[str, tuple[str, dict[str, object]]] = {
        "memory": ("malloc", {"size": DEMO_BYTES}),
        "file": ("file", {"path": str(runtime_dir / "demo.img"), "size": DEMO_BYTES}),
    }
    return tuple(
        DiskSpec(
            name,
            backend,
            backend_options,
            device=device,
            listen=(Address("unix", str(runtime_dir / f"{name}.sock")),),
        )
        for name, (backend, backend_options) in options.items()
    )


def tell_where(disks: Iterable[DiskStatus]) -> None:
    """Say on which device and sockets each disk is served."""
    for disk in disks:
        addresses = [str(address) for address in disk.spec.listen]
        where = " and ".join([disk.device, *addresses] if disk.device else addresses)
        tell(f"disk {disk.spec.name}: {where}")


def _can_attach() -> bool:
    status = Path("/proc/self/status").read_text()
    capabilities = int(status.partition("CapEff:")[2].split()[0], 16)
    return bool(capabilities >> CAP_SYS_ADMIN & 1) and os.path.isdir("/sys/module/nbd")  # noqa: PTH112

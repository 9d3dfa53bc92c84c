"""What the command line asks of the service."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from reactor.log import LogFormat
from reactor.loop import Mode

OnExit: TypeAlias = Literal["disconnect", "keep"]
ON_EXIT: Final[tuple[OnExit, ...]] = ("disconnect", "keep")

RPC_SOCKET: Final = "rpc.sock"  # in the runtime directory


def default_runtime_dir() -> Path:
    """Return where a service of this user keeps its sockets unless it is told otherwise."""
    if os.geteuid() == 0:
        return Path("/run/nbd-reactor")
    if session := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(session, "nbd-reactor")
    return Path(f"/tmp/nbd-reactor-{os.geteuid()}")  # outside of a login session


@dataclass(frozen=True, slots=True)
class Options:
    """The options of `nbd-reactor`, checked."""

    cores: tuple[int, ...]
    runtime_dir: Path
    rpc_socket: Path
    config: Path | None = None
    metrics: tuple[str, int] | None = None  # host, port
    mode: Mode = "adaptive"
    on_exit: OnExit = "disconnect"
    log_format: LogFormat = "text"
    log_level: str = "info"
    strict: bool = False
    lock_memory: bool = False
    demo: bool = False

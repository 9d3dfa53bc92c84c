"""What the command line asks of the service."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

from reactor.log import LogFormat
from reactor.loop import Mode

OnExit: TypeAlias = Literal["disconnect", "keep"]
ON_EXIT: Final[tuple[OnExit, ...]] = ("disconnect", "keep")


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
    demo: bool = False

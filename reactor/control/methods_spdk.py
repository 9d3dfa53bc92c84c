"""SPDK's methods about the process itself."""

from __future__ import annotations

import os
import signal
from typing import Any, Final

from reactor import __version__
from reactor.control.call import Method, Reply
from reactor.control.jsonrpc import INVALID_PARAMS, RpcError
from reactor.control.params import Parameter, string
from reactor.control.spdk import INVALID

#: The SPDK whose methods and client these are.
COMPATIBLE: Final = (26, 9)

_SIGNALS: Final = {
    signal.Signals[name].name: signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGQUIT", "SIGHUP", "SIGKILL", "SIGUSR1")
}


def spdk_methods() -> dict[str, Method]:
    """Return the methods by name."""
    no_parameters = "spdk_get_version method requires no parameters"
    return {
        "spdk_get_version": Method(_get_version, failure=(INVALID_PARAMS, no_parameters)),
        "spdk_kill_instance": Method(_kill, (Parameter("sig_name", string),), INVALID),
    }


def _get_version(_params: dict[str, Any], reply: Reply) -> None:
    """Tell which SPDK this speaks like; the suffix tells what it is."""
    major, minor = COMPATIBLE
    suffix = f"-nbd-reactor-{__version__}"
    reply.result(
        {
            "version": f"SPDK v{major}.{minor:02d}{suffix}",
            "fields": {"major": major, "minor": minor, "patch": 0, "suffix": suffix},
        }
    )


def _kill(params: dict[str, Any], reply: Reply) -> None:
    """Send this process a signal, by name or number; answered after it was sent."""
    name = params["sig_name"]
    by_number = {str(int(number)): number for number in _SIGNALS.values()}
    number = _SIGNALS.get(name) or by_number.get(name)
    if number is None:
        raise RpcError(*INVALID)
    os.kill(os.getpid(), number)
    reply.result(True)

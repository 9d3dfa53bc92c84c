"""All RPC methods of the service."""

from __future__ import annotations

from typing import Any

from reactor.control.bdev import Bdevs
from reactor.control.call import Method, Reply
from reactor.control.methods_bdev import BdevMethods
from reactor.control.methods_nbd import NbdMethods
from reactor.control.methods_reactor import ReactorMethods
from reactor.control.methods_spdk import spdk_methods
from reactor.control.params import Parameter, boolean
from reactor.control.service import Service
from reactor.control.spdk import INVALID


def methods(service: Service) -> dict[str, Method]:
    """Return the methods by name."""
    bdevs = Bdevs(service)
    table = {
        **spdk_methods(),
        **BdevMethods(service, bdevs).table(),
        **NbdMethods(service, bdevs).table(),
        **ReactorMethods(service).table(),
    }

    def get_methods(_params: dict[str, Any], reply: Reply) -> None:
        """List the methods. All can be called at any time, and none has an alias."""
        reply.result(list(table))

    flags = tuple(
        Parameter(flag, boolean, required=False) for flag in ("current", "include_aliases")
    )
    table["rpc_get_methods"] = Method(get_methods, flags, INVALID)
    return table

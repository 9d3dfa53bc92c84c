"""The command `nbd-reactorctl`: a person's view of the RPC socket."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from reactor import __version__, streams, usage
from reactor.errors import ReactorError, reason
from reactor.options import RPC_SOCKET, default_runtime_dir
from reactor.rpc_client import RpcClient
from reactor.tables import disk_line, disk_table, show_disk, show_status
from reactor.units import parse_size

PROGRAM: Final = "nbd-reactorctl"
TIMEOUT_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 0.1
EXAMPLES: Final = {
    "nbd-reactorctl list": "what is served",
    "nbd-reactorctl start scratch backend=malloc size=1GiB device=auto": "a new disk",
    "nbd-reactorctl resize scratch 2GiB": "make it larger",
    'nbd-reactorctl rpc bdev_get_bdevs \'{"name": "scratch"}\'': "ask as SPDK's client does",
}
EXIT_STATUS: Final = {
    "0": "done",
    "1": "failed: no service there, or it said no",
    "2": "wrong usage",
}

#: Sends a command's calls and returns what --json prints, and the text for people.
Command = Callable[[RpcClient, argparse.Namespace], tuple[Any, str]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    streams.open_missing()
    arguments = parser().parse_args(argv)
    command: Command = arguments.command
    try:
        with RpcClient(arguments.socket, arguments.timeout) as client:
            result, text = command(client, arguments)
        return _print(json.dumps(result, indent=2) if arguments.json else text)
    except (ReactorError, OSError) as error:
        sys.stderr.write(f"{PROGRAM}: {reason(error)}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(f"{PROGRAM}: interrupted\n")
        return 1


def _print(text: str) -> int:
    try:
        sys.stdout.buffer.write(text.encode() + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        # The reader has seen enough. What Python still holds must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# --- commands ---


def _status(client: RpcClient, _arguments: argparse.Namespace) -> tuple[Any, str]:
    status = client.call("reactor_get_status")
    workers = client.call("reactor_get_workers")
    disks = client.call("reactor_get_disks")
    result = {**status, "workers": workers, "disks": disks}
    return result, show_status(status, workers, disks)


def _list(client: RpcClient, _arguments: argparse.Namespace) -> tuple[Any, str]:
    disks = client.call("reactor_get_disks")
    return disks, disk_table(disks)


def _show(client: RpcClient, arguments: argparse.Namespace) -> tuple[Any, str]:
    disk = _disk(client, arguments.disk)
    return disk, show_disk(disk)


def _start(client: RpcClient, arguments: argparse.Namespace) -> tuple[Any, str]:
    params: dict[str, Any] = {"name": arguments.disk}
    if arguments.keys:
        params["keys"] = dict(arguments.keys)
    client.call("reactor_start_disk", params)
    disk = _disk(client, arguments.disk)
    return disk, disk_line(disk)


def _stop(client: RpcClient, arguments: argparse.Namespace) -> tuple[Any, str]:
    result = client.call("reactor_stop_disk", {"name": arguments.disk})
    return result, f"{arguments.disk}: stopped"


def _remove(client: RpcClient, arguments: argparse.Namespace) -> tuple[Any, str]:
    result = client.call("reactor_remove_disk", {"name": arguments.disk})
    return result, f"{arguments.disk}: removed"


def _resize(client: RpcClient, arguments: argparse.Namespace) -> tuple[Any, str]:
    client.call("reactor_resize_disk", {"name": arguments.disk, "size": arguments.size})
    disk = _disk(client, arguments.disk)
    return disk, disk_line(disk)


def _reload(client: RpcClient, _arguments: argparse.Namespace) -> tuple[Any, str]:
    failed_before = {disk["name"] for disk in _in_state(client, "failed")}
    result = client.call("reactor_reload")
    while moving := _in_state(client, "starting", "stopping"):
        if client.seconds_left < 1:
            names = ", ".join(disk["name"] for disk in moving)
            raise ReactorError(f"config reloaded, but it is not done yet with {names}")
        time.sleep(LOOK_SECONDS)
    failed = [disk for disk in _in_state(client, "failed") if disk["name"] not in failed_before]
    if failed:
        reasons = "; ".join(f"disk {disk['name']} failed: {disk['reason']}" for disk in failed)
        raise ReactorError(f"config reloaded, but {reasons}")
    return result, "config reloaded"


def _rpc(client: RpcClient, arguments: argparse.Namespace) -> tuple[Any, str]:
    result = client.call(arguments.method, arguments.params)
    return result, json.dumps(result, indent=2)


def _in_state(client: RpcClient, *states: str) -> list[dict[str, Any]]:
    return [disk for disk in client.call("reactor_get_disks") if disk["state"] in states]


def _disk(client: RpcClient, name: str) -> dict[str, Any]:
    disk: dict[str, Any] = client.call("reactor_get_disks", {"name": name})[0]
    return disk


# --- usage ---


def parser() -> argparse.ArgumentParser:
    """Return what knows all commands and options."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Look at a running nbd-reactor, and change what it serves.",
        epilog=usage.epilog(examples=EXAMPLES, exit_status=EXIT_STATUS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    socket = default_runtime_dir() / RPC_SOCKET
    _add_common(parser, socket=socket, json=False, timeout=TIMEOUT_SECONDS)
    # The common options may also stand behind the command, and leave those before it alone there.
    common = argparse.ArgumentParser(add_help=False)
    suppress = argparse.SUPPRESS
    _add_common(common, socket=suppress, json=suppress, timeout=suppress)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=text, description=text, parents=[common], allow_abbrev=False
        )
        added.set_defaults(command=command)
        return added

    def add_disk(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        added = add(name, command, text)
        added.add_argument("disk", metavar="DISK")
        return added

    add("status", _status, "show the service, its workers, and disks that are not online")
    add("list", _list, "list the disks")
    add_disk("show", _show, "show a disk: its config and its live state")
    start = add_disk("start", _start, "start a disk that is down; with keys, make a new one")
    start.add_argument(
        "keys", metavar="KEY=VALUE", nargs="*", type=_key, help="the keys of disks.yaml"
    )
    add_disk("stop", _stop, "drain and stop a disk; start brings it back")
    add_disk("remove", _remove, "hot-remove a disk: its I/O fails, and it is forgotten")
    resize = add_disk("resize", _resize, "change a disk's size")
    resize.add_argument("size", metavar="SIZE", type=_size, help="bytes, or like 64MiB")
    add("reload", _reload, "read the config file again, and wait for the disks")
    rpc = add("rpc", _rpc, "call an RPC method and print its result")
    rpc.add_argument("method", metavar="METHOD")
    rpc.add_argument("params", metavar="JSON", nargs="?", type=_json, help="its parameters")
    return parser


def _add_common(parser: argparse.ArgumentParser, *, socket: Any, json: Any, timeout: Any) -> None:
    parser.add_argument(
        "--socket", metavar="PATH", type=Path, default=socket, help="the service's RPC socket"
    )
    parser.add_argument("--json", action="store_true", default=json, help="print JSON")
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=timeout,
        help=f"how long to wait for the service ({TIMEOUT_SECONDS:.0f})",
    )


def _key(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    if value in ("true", "false") or value.startswith("["):
        return key, _json(value)
    # The service has another working directory than the person.
    return key, str(Path(value).absolute()) if key == "path" and value else value


def _size(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not size:
        raise argparse.ArgumentTypeError("a size must be more than 0")
    return size


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds up to 86400")
    return seconds


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None


if __name__ == "__main__":
    sys.exit(main())

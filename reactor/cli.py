"""The command `nbd-reactor`: its options, its exit status and nothing else."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn, TypeVar

from reactor import __version__, log, streams, usage
from reactor.cores import parse_cores
from reactor.errors import ConfigError, ReactorError, UsageError, quoted, reason
from reactor.loop import MODES
from reactor.options import ON_EXIT, RPC_SOCKET, Options, default_runtime_dir
from reactor.spec import UNIX_PATH_MAX, Address

T = TypeVar("T")

PROGRAM: Final = "nbd-reactor"
EXAMPLES: Final = {
    "nbd-reactor --demo": "two small disks to try it out, without any preparation",
    "nbd-reactor --cores 0-3 --config disks.yaml": (
        "the disks of disks.yaml, spread over the workers of four cores"
    ),
}
SIGNALS: Final = {
    "SIGTERM, SIGINT": "drain and stop; a second one stops by force",
    "SIGUSR1": "stop as with --on-exit keep, for a restart that nobody notices",
    "SIGHUP": "read the config again and change only what has changed",
}
EXIT_STATUS: Final = {
    "0": "stopped because it was asked to",
    "1": "failed at run time",
    "2": "wrong usage, or a config with problems",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    streams.open_missing()
    try:
        arguments = parser().parse_args(argv)
        if arguments.lock_memory and arguments.mode == "poll":
            raise UsageError(
                "--lock-memory makes workers realtime processes, which must sleep: not with"
                " --mode poll"
            )
        if arguments.check:
            return _check(arguments)
        return _serve(arguments)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")  # every line begins with its file, as editors like it
        return 2
    except UsageError as error:
        return _fail(reason(error), 2)
    except (ReactorError, OSError) as error:
        return _fail(reason(error), 1)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)


def _fail(why: str, status: int) -> int:
    sys.stderr.write(f"{PROGRAM}: {why}\n")
    return status


def parser(runtime_dir: str | None = None) -> argparse.ArgumentParser:
    """Return what knows all options; `runtime_dir` says what the default one is."""
    parser = _Parser(
        prog=PROGRAM,
        description="Serve storage backends as Linux block devices and over the NBD protocol.",
        epilog=usage.epilog(examples=EXAMPLES, signals=SIGNALS, exit_status=EXIT_STATUS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    _add_what_to_serve(parser.add_argument_group("what to serve"))
    _add_how_to_run(parser.add_argument_group("how to run"))
    _add_where_to_listen(
        parser.add_argument_group("where to steer and watch it"),
        runtime_dir or str(default_runtime_dir()),
    )
    about = parser.add_argument_group("about")
    about.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    about.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def _add_what_to_serve(group: argparse._ArgumentGroup) -> None:
    source = group.add_mutually_exclusive_group()
    source.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        help="the disks to serve (YAML); without it the service starts empty and is driven over"
        " its RPC socket",
    )
    source.add_argument(
        "--demo",
        action="store_true",
        help="serve two small example disks and print how to connect",
    )
    group.add_argument(
        "--check",
        action="store_true",
        help="read the config, print what is wrong with it, start nothing",
    )
    group.add_argument(
        "--strict",
        action="store_true",
        help="exit 1 when a disk cannot start, instead of serving the others",
    )


def _add_how_to_run(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--cores",
        metavar="LIST",
        type=_checked(parse_cores),
        default="all",
        help="the CPU cores that get a worker each: 0-3, 0,2,4-7, 0x0f or all (default: all that"
        " the process may run on)",
    )
    group.add_argument(
        "--mode",
        choices=MODES,
        default="adaptive",
        metavar="MODE",
        help="what workers do when nothing is ready: look again for a while and then sleep"
        " (adaptive), never sleep (poll), always sleep (interrupt); default: %(default)s",
    )
    group.add_argument(
        "--on-exit",
        choices=ON_EXIT,
        default="disconnect",
        metavar="ACTION",
        help="what SIGTERM does to kernel devices: disconnect, or keep (the kernel holds new I/O"
        " until the next start adopts the device, at most dead_timeout seconds); default:"
        " %(default)s",
    )
    group.add_argument(
        "--lock-memory",
        action="store_true",
        help="keep all memory of the service out of swap, for a host that swaps to its disks;"
        " needs CAP_IPC_LOCK or RLIMIT_MEMLOCK unlimited",
    )
    group.add_argument(
        "--log-format",
        choices=log.FORMATS,
        default="text",
        metavar="FORMAT",
        help="text or json; default: %(default)s",
    )
    group.add_argument(
        "--log-level",
        choices=log.LEVELS,
        default="info",
        metavar="LEVEL",
        help=f"{', '.join(log.LEVELS)}; default: %(default)s",
    )


def _add_where_to_listen(group: argparse._ArgumentGroup, runtime_dir: str) -> None:
    runtime_dir = runtime_dir.replace("%", "%%")  # argparse formats its texts
    group.add_argument(
        "--runtime-dir",
        metavar="DIR",
        type=_checked(_path),
        help=f"holds the sockets, the lock and the saved state; default: {runtime_dir}",
    )
    group.add_argument(
        "--rpc-socket",
        metavar="PATH",
        type=_checked(_socket_path),
        help=f"the JSON-RPC socket; default: {RPC_SOCKET} in the runtime directory",
    )
    group.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        type=_checked(_host_and_port),
        help="serve Prometheus metrics there, on /metrics; default: off",
    )


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message.removeprefix('argument ')}; see {PROGRAM} --help")


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Return `parse` as argparse wants it: what its ValueError says is shown as it is."""

    def parsed(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parsed


def _path(text: str) -> Path:
    if not text or "\0" in text:
        raise ValueError(f"{quoted(text)} is not a path")
    return Path(text)


def _socket_path(text: str) -> Path:
    path = _path(text).absolute()
    if len(os.fsencode(path)) > UNIX_PATH_MAX:
        raise ValueError(f"the path is longer than {UNIX_PATH_MAX} bytes")
    return path


def _host_and_port(text: str) -> tuple[str, int]:
    try:
        address = Address.parse(f"tcp:{text}")
    except ValueError:
        raise ValueError(f"{quoted(text)} is not HOST:PORT with a port from 1 to 65535") from None
    return address.target, address.port


def _check(arguments: argparse.Namespace) -> int:
    if arguments.config is None:
        raise UsageError(f"--check needs --config; see {PROGRAM} --help")
    # Imported late, as the controller is: --version and --help answer at once.
    from backends import registry  # noqa: PLC0415
    from reactor import config  # noqa: PLC0415

    disks = config.load(arguments.config, registry.schemas(), arguments.cores)
    count = f"{len(disks)} disk" + ("" if len(disks) == 1 else "s")
    sys.stdout.write(f"{arguments.config}: {count}, no problems found\n")
    return 0


def _serve(arguments: argparse.Namespace) -> int:
    runtime_dir = (arguments.runtime_dir or default_runtime_dir()).absolute()
    if arguments.runtime_dir is None:
        _make_private(runtime_dir)
    options = Options(
        cores=arguments.cores,
        runtime_dir=runtime_dir,
        rpc_socket=arguments.rpc_socket or runtime_dir / RPC_SOCKET,
        config=arguments.config,
        metrics=arguments.metrics,
        mode=arguments.mode,
        on_exit=arguments.on_exit,
        log_format=arguments.log_format,
        log_level=arguments.log_level,
        strict=arguments.strict,
        lock_memory=arguments.lock_memory,
        demo=arguments.demo,
    )
    log.set_up("controller", options.log_format, options.log_level)
    from reactor.control.run import run  # noqa: PLC0415

    return run(options)


def _make_private(directory: Path) -> None:
    """Make the directory, or be sure that nobody else did: in /tmp anyone may."""
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        raise UsageError(
            f"{directory} is not a directory that only this user may write to;"
            " remove it or choose another with --runtime-dir"
        )

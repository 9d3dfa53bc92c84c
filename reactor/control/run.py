"""The controller process, from its first signal mask to its exit status."""

from __future__ import annotations

import faulthandler
import resource
import signal
from contextlib import ExitStack
from logging import WARNING
from typing import Final

from setproctitle import setproctitle

from backends import registry
from reactor import config, pressure
from reactor.control.clock import WakingClock
from reactor.control.controller import Controller
from reactor.control.demo import demo_disks
from reactor.control.exporter import Exporter
from reactor.control.linux import Linux
from reactor.control.methods import methods
from reactor.control.notify import extend_start, feed_watchdog, handed_sockets
from reactor.control.rpc import RpcServer
from reactor.control.runtime import RuntimeDir
from reactor.errors import reason
from reactor.log import logger
from reactor.loop import Reactor
from reactor.options import Options
from reactor.spec import DiskSpec

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

log = logger(__name__)


def run(options: Options) -> int:
    """Run the service until it is asked to stop; returns the exit status."""
    setproctitle("nbd-reactor: controller")
    faulthandler.enable()  # a watchdog's SIGABRT shows where it hung
    # Blocked until the loop can take them, and again when it is gone: an orderly stop is the only
    # way that they end this process.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    specs = _read_config(options)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # each disk and worker needs some
    # While a worker is dead, I/O on its devices waits for this process to start another.
    pressure.prepare(WARNING)  # the workers inherit what failed: once is enough
    if options.lock_memory:
        pressure.lock_memory()
    with ExitStack() as opened:
        runtime = RuntimeDir(options.runtime_dir)
        opened.callback(runtime.close)
        saved = runtime.load()
        handed = handed_sockets()
        for sock in (sock for socks in handed.values() for sock in socks):
            opened.callback(sock.close)
        reactor = Reactor("interrupt", clock=WakingClock())
        opened.callback(reactor.close)
        linux = Linux(reactor, options, runtime)
        opened.callback(linux.close)
        controller = Controller(options, linux, lambda: _read_config(options), handed)
        opened.callback(controller.close)
        rpc = RpcServer(reactor, options.rpc_socket, methods(controller))
        opened.callback(rpc.close)
        if options.metrics is not None:
            opened.callback(Exporter(reactor, options.metrics, controller).close)
        _take_signals(reactor, controller)
        feed_watchdog(reactor)
        extend_start(reactor, lambda: controller.ready)
        controller.begin(saved, specs)
        reactor.run()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        if not controller.keeps:
            runtime.forget()
    return controller.exit_status


def _read_config(options: Options) -> tuple[DiskSpec, ...] | None:
    if options.demo:
        return demo_disks(options.runtime_dir)
    if options.config is None:
        return None
    return config.load(options.config, registry.schemas(), options.cores)


def _take_signals(reactor: Reactor, controller: Controller) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        reactor.add_signal(number, controller.shut_down)
    reactor.add_signal(signal.SIGUSR1, lambda: controller.shut_down(keep=True))
    reactor.add_signal(signal.SIGHUP, lambda: controller.reload(_log_reload))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def _log_reload(error: Exception | None) -> None:
    if error is None:
        log.info("config reloaded")
    else:
        log.error("config not reloaded, or not in full: %s", reason(error))

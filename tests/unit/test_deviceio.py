"""The process for device I/O, without a device: it is asked, killed, asked again, and ended."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from reactor.attach import apart
from reactor.attach.apart import DeviceIO
from reactor.attach.deviceio import What
from tests.descriptors import open_files
from tests.deviceio import device_io, stopped

NOWHERE = 999_999  # no driver has so many devices
WAIT_SECONDS = 20.0


@pytest.fixture
def asked() -> Iterator[DeviceIO]:
    made = DeviceIO()
    yield made
    made.close()


def process_of(asked: DeviceIO) -> psutil.Process:
    asked.await_start()
    process = device_io()
    assert process is not None
    return process


def await_true(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("what", set(What) - {What.SAY_READY})
def test_an_answer_is_the_errno(asked: DeviceIO, what: What) -> None:
    with pytest.raises(FileNotFoundError):
        asked.ask(what, NOWHERE, 512).wait(WAIT_SECONDS)


def test_it_is_there_before_the_first_call_and_no_call_needs_a_descriptor(asked: DeviceIO) -> None:
    asked.start()
    process = process_of(asked)
    before = len(open_files())
    for _ in range(100):
        with pytest.raises(FileNotFoundError):
            asked.ask(What.LOOK, NOWHERE).wait(WAIT_SECONDS)
    assert len(open_files()) == before
    assert device_io() == process


def test_it_holds_nothing_and_is_in_nobodys_way(asked: DeviceIO) -> None:
    with Path(__file__).open("rb") as file:
        os.set_inheritable(file.fileno(), True)
        process = process_of(asked)
    names = {name.partition(":")[0] for name in open_files(process.pid)}
    assert names == {"socket", "/dev/null", "pipe"}
    assert process.cwd() == "/"
    assert os.getsid(process.pid) == process.pid


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_to_all_processes_do_not_end_it(asked: DeviceIO, number: str) -> None:
    process = process_of(asked)
    process.send_signal(signal.Signals[number])
    with pytest.raises(FileNotFoundError):
        asked.ask(What.LOOK, NOWHERE).wait(WAIT_SECONDS)
    assert device_io() == process


def test_what_a_killed_one_was_asked_the_next_one_answers(asked: DeviceIO) -> None:
    process = process_of(asked)
    with stopped(process):
        calls = [asked.ask(What.LOOK, NOWHERE) for _ in range(3)]
        process.kill()
        for call in calls:
            with pytest.raises(FileNotFoundError):
                call.wait(WAIT_SECONDS)
    assert process_of(asked) != process
    await_true(lambda: not psutil.pid_exists(process.pid))


def test_a_call_that_was_lost_twice_fails(asked: DeviceIO) -> None:
    first = process_of(asked)
    first.suspend()
    call = asked.ask(What.LOOK, NOWHERE)
    ended = threading.Event()

    def kill_each() -> None:
        while not ended.is_set():
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    child.kill()
            time.sleep(0.005)

    killing = threading.Thread(target=kill_each)
    killing.start()
    try:
        with pytest.raises(OSError, match="Cannot allocate memory"):
            call.wait(WAIT_SECONDS)
    finally:
        ended.set()
        killing.join()


def test_one_that_does_not_read_holds_nobody_up(asked: DeviceIO) -> None:
    def ask_much() -> None:
        for _ in range(10_000):
            asked.ask(What.LOOK, NOWHERE)

    with stopped(process_of(asked)):
        with pytest.raises(OSError, match="No buffer space"):
            ask_much()
        call = next(iter(asked._asked.values()))
        with pytest.raises(TimeoutError):
            call.wait(0.01)
    with pytest.raises(FileNotFoundError):
        call.wait(WAIT_SECONDS)


def test_one_that_cannot_be_started_is_the_callers_error(
    asked: DeviceIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(apart.subprocess, "Popen", none)
        with pytest.raises(OSError, match="Too many open files"):
            asked.ask(What.LOOK, NOWHERE)
    with pytest.raises(FileNotFoundError):
        asked.ask(What.LOOK, NOWHERE).wait(WAIT_SECONDS)


def test_one_that_hangs_is_replaced(asked: DeviceIO, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(apart, "ALIVE_SECONDS", 1.0)
    process = process_of(asked)
    process.suspend()
    with pytest.raises(FileNotFoundError):
        asked.ask(What.LOOK, NOWHERE).wait()
    assert process_of(asked) != process


def test_one_that_hangs_is_replaced_by_who_waits_no_longer(
    asked: DeviceIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "ALIVE_SECONDS", 1.0)
    process = process_of(asked)
    process.suspend()
    calls = [asked.ask(What.LOOK, NOWHERE) for _ in range(3)]
    for call in calls:
        with pytest.raises(TimeoutError):
            call.wait(0.01)
    for call in calls:
        with pytest.raises(FileNotFoundError):
            call.wait(WAIT_SECONDS)
    assert process_of(asked) != process


def test_one_that_never_starts_is_awaited_once(
    asked: DeviceIO, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    silent = tmp_path / "python"
    silent.write_text("#!/bin/sh\nexec sleep 60\n")
    silent.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(silent))
    monkeypatch.setattr(apart, "START_SECONDS", 0.5)
    asked.start()
    (process,) = psutil.Process().children()
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(TimeoutError):
            asked.await_start()
    assert time.monotonic() - began < 20 * apart.START_SECONDS
    process.kill()


def test_it_ends_with_whoever_started_it(asked: DeviceIO) -> None:
    process = process_of(asked)
    asked._process._socket.shutdown(2)
    await_true(lambda: not psutil.pid_exists(process.pid))

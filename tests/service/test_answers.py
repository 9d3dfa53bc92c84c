"""What a command is told that another one overtook, or that could not be done as a whole."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.running import RunningService
from tests.service.memory_disks import nbdsh, ram

Start = Callable[..., RunningService]
Answer = dict[str, Any]
KEYS = {"backend": "malloc", "size": "1MiB"}


@pytest.fixture
def ask() -> Iterator[Callable[..., Future[Answer]]]:
    """Ask without waiting for the answer."""
    with ThreadPoolExecutor() as pool:
        yield lambda running, method, **params: pool.submit(running.rpc_raw, method, **params)


def check_overtaken(answer: Answer, how: str) -> None:
    assert answer["error"]["code"] == -errno.ECANCELED
    assert f"was {how} meanwhile" in answer["error"]["message"]


@pytest.mark.parametrize("command", ["stop", "remove"])
@pytest.mark.parametrize("begun", ["create", "start"])
def test_what_never_came_up_is_not_called_started(
    service: Start, tmp_path: Path, ask: Callable[..., Future[Answer]], command: str, begun: str
) -> None:
    running = service(ram(tmp_path, "a"))
    if begun == "start":
        running.rpc("reactor_start_disk", name="b", keys=KEYS)
        running.rpc("reactor_stop_disk", name="b")
    (worker,) = running.workers().values()
    worker.suspend()
    keys = {"keys": KEYS} if begun == "create" else {}
    starting = ask(running, "reactor_start_disk", name="b", **keys)
    running.await_true(
        lambda: [d["state"] for d in running.rpc("reactor_get_disks")][1:] == ["starting"]
    )
    overtaking = ask(running, f"reactor_{command}_disk", name="b")
    running.await_true(lambda: not worker.is_running())  # it answers nobody
    assert "error" not in overtaking.result()
    check_overtaken(starting.result(), {"stop": "stopped", "remove": "removed"}[command])
    left = {disk["name"]: disk["state"] for disk in running.rpc("reactor_get_disks")}
    assert left.get("b") == {"stop": "stopped", "remove": None}[command]
    running.await_state("a", "online")


def test_a_stop_that_was_overtaken_by_a_start_says_so(
    service: Start, tmp_path: Path, ask: Callable[..., Future[Answer]]
) -> None:
    running = service(ram(tmp_path, "a"))
    (worker,) = running.workers().values()
    worker.suspend()
    stopping = ask(running, "reactor_stop_disk", name="a")
    running.await_true(lambda: running.rpc("reactor_get_disks", name="a")[0]["state"] == "stopping")
    starting = ask(running, "reactor_start_disk", name="a")
    assert "error" not in starting.result()
    check_overtaken(stopping.result(), "started")
    # The start may have come before the worker was told to stop: then it is found hung later.
    running.await_true(lambda: not worker.is_running())
    running.await_state("a", "online")
    nbdsh(tmp_path, "a", "h.pwrite(b's' * 4096, 0)")


def test_a_remove_that_leaves_memory_says_so(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    (memory,) = Path("/dev/shm").glob(f"nbd-reactor-{instance(running)}-*")
    memory.unlink()
    memory.mkdir()  # what cannot be removed as memory is
    try:
        answer = running.rpc_raw("reactor_remove_disk", name="a")
        assert "what disk a kept cannot be removed: " in answer["error"]["message"]
        assert str(memory) in answer["error"]["message"]
        assert running.rpc("reactor_get_disks") == []
        assert (
            b'"a"' not in (running.runtime_dir / "state.json").read_bytes().split(b"configured")[0]
        )
    finally:
        memory.rmdir()
    running.rpc("reactor_start_disk", name="a", keys=KEYS)
    assert "Traceback" not in running.log


def instance(running: RunningService) -> str:
    return (running.runtime_dir / "instance").read_text().strip()

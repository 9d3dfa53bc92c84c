"""The whole service on sockets: start, stop, reload, supervise, and survive its users."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from tests.commands import run
from tests.running import RunningService
from tests.service.memory_disks import nbdsh, ram

Start = Callable[..., RunningService]
MIB = 1 << 20


# --- start and stop ---


def test_ready_is_said_once_everything_is_up(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a", "b"))
    assert running.await_line("ready:").startswith("ready: 2 of 2 disks on 1 workers")
    nbdsh(tmp_path, "a", "assert h.get_size() == 8 << 20")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopping_exits_0_and_leaves_nothing(
    service: Start, tmp_path: Path, number: signal.Signals
) -> None:
    running = service(ram(tmp_path, "a"))
    assert running.stop(number) == 0
    assert {path.name for path in running.runtime_dir.iterdir()} <= {
        "lock",
        "instance",
        "rpc.sock.lock",
    }
    assert not (tmp_path / "a.sock").exists()


def test_the_service_manager_is_told(
    service: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        running = service(ram(tmp_path, "a"))
        assert manager.recv(4096).startswith(b"READY=1")
        running.stop()
        assert manager.recv(4096) == b"STOPPING=1\nSTATUS=stopping"


def test_a_second_service_on_the_runtime_directory_is_refused(service: Start) -> None:
    first = service()
    second = service(runtime_dir=first.runtime_dir, await_ready=False)
    assert second.process.wait(30) == 1
    refusal = f"another nbd-reactor (pid {first.process.pid}) runs on {first.runtime_dir}"
    assert refusal in second.log
    assert first.rpc("reactor_get_disks") == []


def test_signals_in_any_order_still_exit_0(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    while running.process.poll() is None:
        running.process.send_signal(signal.SIGTERM)
    assert running.process.returncode == 0


def test_a_second_signal_forces_even_past_a_stopped_worker(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    worker = running.workers()[0]
    worker.suspend()
    running.process.send_signal(signal.SIGTERM)
    running.await_line("stopping")
    assert running.stop() == 0
    assert not worker.is_running()


# --- failing disks ---


def test_a_disk_that_cannot_start_is_named_and_stops_no_other(
    service: Start, tmp_path: Path
) -> None:
    config = ram(tmp_path, "good") + f"  bad: {{backend: file, path: {tmp_path}/absent}}\n"
    running = service(config)
    assert f"{tmp_path}/absent" in running.await_line("disk bad failed:")
    assert "failed: bad" in running.await_line("ready:")
    nbdsh(tmp_path, "good", "h.pread(512, 0)")


def test_a_worker_that_cannot_listen_again_serves_where_it_can(
    service: Start, tmp_path: Path
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    path = place / "a.sock"
    addresses = f"['unix:{path}', 'unix:{tmp_path}/other.sock']"
    running = service(f"disks: {{a: {{backend: malloc, size: 8MiB, listen: {addresses}}}}}")
    path.unlink()
    place.rmdir()
    running.workers()[0].kill()
    running.await_line("disk a is not served everywhere: ")

    def reason() -> str:
        (disk,) = running.rpc("reactor_get_disks")
        return str(disk["reason"]) if disk["state"] == "online" else ""

    running.await_true(lambda: f"not served everywhere: cannot listen on unix:{path}" in reason())
    nbdsh(tmp_path, "a", "h.pread(512, 0)", on="other")
    place.mkdir()
    running.await_line("disk a is served everywhere again")
    nbdsh(place, "a", "assert h.get_size() == 8 << 20")
    running.await_true(lambda: reason() == "")


def test_strict_makes_a_failing_disk_fatal(service: Start, tmp_path: Path) -> None:
    config = f"disks: {{bad: {{backend: file, path: {tmp_path}}}}}"
    running = service(config, "--strict", await_ready=False)
    assert running.process.wait(30) == 1
    assert "not started: bad (--strict)" in running.log


def test_an_address_in_use_fails_the_disk_alone(service: Start, tmp_path: Path) -> None:
    service(ram(tmp_path, "a"))
    other = service(ram(tmp_path, "a") + "  b: {backend: 'null', size: 1MiB}\n")
    assert "a.sock" in other.await_line("disk a failed:")
    nbdsh(tmp_path, "a", "h.pread(512, 0)")


# --- supervision ---


def test_a_killed_worker_comes_back_with_its_data(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'k' * 4096, 8192)")
    old = running.workers()[0]
    old.kill()
    running.await_true(lambda: running.workers().get(0, old) != old)
    running.await_state("a", "online")
    nbdsh(tmp_path, "a", "assert h.pread(4096, 8192) == b'k' * 4096")


def test_a_worker_that_keeps_dying_is_given_up_and_its_disk_says_so(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a", more=", core: 0"))
    killed: set[int] = set()

    def give_up() -> bool:
        for worker in running.workers().values():
            if worker.pid not in killed:
                killed.add(worker.pid)
                worker.kill()
        state: str = running.rpc("reactor_get_disks", name="a")[0]["state"]
        return state == "failed"

    running.await_true(give_up, 100)
    running.rpc("reactor_start_disk", name="a")
    nbdsh(tmp_path, "a", "h.pread(512, 0)")


def test_workers_serve_on_without_their_controller(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'c' * 4096, 0)")
    running.process.kill()
    running.process.wait()
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'c' * 4096")
    again = service(ram(tmp_path, "a"), runtime_dir=running.runtime_dir)
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'c' * 4096")
    assert len(again.workers()) == 1


def test_memory_that_a_dead_service_left_is_reported_and_reused_by_its_disk(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'l' * 4096, 0)")
    worker = running.workers()[0]
    running.process.kill()
    running.process.wait()
    worker.kill()
    (running.runtime_dir / "state.json").unlink()
    again = service(runtime_dir=running.runtime_dir)
    again.await_line("left data of the malloc disk a")
    again.rpc("bdev_malloc_create", name="a", num_blocks=16384, block_size=512)
    keys = {"backend": "malloc", "size": "8MiB", "listen": f"unix:{tmp_path}/a.sock"}
    again.rpc("reactor_remove_disk", name="a")
    assert again.rpc_raw("reactor_start_disk", name="a", keys=keys)["result"] is True
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == bytes(4096)")


def test_workers_are_named_and_pinned(service: Start) -> None:
    core = min(os.sched_getaffinity(0))
    running = service(cores=str(core))
    worker = running.workers()[core]
    assert worker.cmdline()[0] == f"nbd-reactor: worker core {core}"
    assert {thread.id for thread in worker.threads()}
    for thread in worker.threads():
        assert os.sched_getaffinity(thread.id) == {core}


# --- hot remove ---


def test_hot_remove_ends_clients_and_leaves_others_alone(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "goes", "stays"))
    script = f"""
import subprocess, time
h.pread(512, 0)
subprocess.run([{sys.executable!r}, '-m', 'reactor.ctl', '--socket', {str(running.rpc_socket)!r},
                'remove', 'goes'], check=True)
try:
    for _ in range(1000):
        h.pread(512, 0)
        time.sleep(0.01)
except nbd.Error:
    pass
else:
    raise AssertionError('still served')
"""
    nbdsh(tmp_path, "goes", script)
    nbdsh(tmp_path, "stays", "h.pread(512, 0)")


@pytest.mark.parametrize("harm", ["unlink", "truncate", "replace"])
def test_a_lost_backing_file_is_a_hot_remove(service: Start, tmp_path: Path, harm: str) -> None:
    image = tmp_path / "image"
    running = service(
        f"disks: {{f: {{backend: file, path: {image}, size: 4MiB,"
        f" listen: 'unix:{tmp_path}/f.sock'}}}}"
    )
    nbdsh(tmp_path, "f", "h.pwrite(b'x' * 65536, 0)")
    if harm == "truncate":
        os.truncate(image, 4096)
    else:
        image.unlink()
    if harm == "replace":
        image.write_bytes(bytes(4 * MIB))
    assert running.await_state("f", "removed")["reason"]
    assert not (tmp_path / "f.sock").exists()


# --- hostile clients ---

OPTION_GO = struct.pack(">QIIIH", 0x49484156454F5054, 7, 6, 0, 0)


def raw_client(tmp_path: Path, name: str) -> socket.socket:
    """A socket whose handshake is done."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(tmp_path / f"{name}.sock"))
    sock.recv(18, socket.MSG_WAITALL)
    sock.sendall(struct.pack(">I", 3) + OPTION_GO)
    while True:
        _, _, kind, length = struct.unpack(">QIII", sock.recv(20, socket.MSG_WAITALL))
        if length:
            sock.recv(length, socket.MSG_WAITALL)
        if kind == 1:
            return sock


def request(command: int, offset: int, length: int, flags: int = 0) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, 7, offset, length)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.0\r\n\r\n", bytes(4096), os.urandom(65536)],
    ids=["http", "zeroes", "random"],
)
@pytest.mark.parametrize("phase", ["handshake", "transmission"])
def test_garbage_ends_one_connection_with_one_clear_line(
    service: Start, tmp_path: Path, garbage: bytes, phase: str
) -> None:
    running = service(ram(tmp_path, "a"))
    if phase == "handshake":
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(str(tmp_path / "a.sock"))
        client.recv(18, socket.MSG_WAITALL)
    else:
        client = raw_client(tmp_path, "a")
    with client:
        client.sendall(garbage)
        client.shutdown(socket.SHUT_WR)
        try:
            while client.recv(4096):
                pass
        except ConnectionResetError:
            pass
    assert "Traceback" not in running.log
    nbdsh(tmp_path, "a", "h.pread(512, 0)")


def test_a_request_for_4_gib_is_answered_with_an_error(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    with raw_client(tmp_path, "a") as client:
        client.sendall(request(0, 0, 0xFFFFFE00))
        magic, error, cookie = struct.unpack(">IIQ", client.recv(16, socket.MSG_WAITALL))
        assert (magic, cookie) == (0x67446698, 7)
        assert error != 0
        client.sendall(request(0, 0, 512))
        assert len(client.recv(16 + 512, socket.MSG_WAITALL)) == 528
    with raw_client(tmp_path, "a") as client:
        client.sendall(request(1, 0, 0xFFFFFE00))
        assert client.recv(16) == b""
    memory = running.workers()[0].memory_info().rss
    assert memory < 256 * MIB


def test_a_client_that_leaves_amid_a_payload_harms_nobody(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    with raw_client(tmp_path, "a") as client:
        client.sendall(request(1, 0, 65536) + b"x" * 1000)
    nbdsh(tmp_path, "a", "assert h.pread(65536, 0) == bytes(65536)")
    assert "Traceback" not in running.log


def test_a_client_that_reads_no_replies_is_bounded(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    with raw_client(tmp_path, "a") as client:
        client.settimeout(1)
        with pytest.raises(TimeoutError):  # nobody takes what exceeds the bounds
            client.sendall(request(0, 0, 8 * MIB) * 1_000_000)
        assert running.workers()[0].memory_info().rss < 256 * MIB
        nbdsh(tmp_path, "a", "h.pread(512, 0)")


# --- hostile places ---


def test_a_runtime_directory_that_others_may_write_to_is_refused(
    service: Start, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    running = service(None, runtime_dir=shared, await_ready=False)
    assert running.process.wait(30) == 1
    assert "other users own it or may write to it" in running.log
    assert not list(shared.iterdir())


# --- systemd ---


def test_every_socket_of_systemd_is_served(service: Start, tmp_path: Path) -> None:
    path = tmp_path / "activated.sock"
    config = tmp_path / "activated.yaml"
    config.write_text("disks: {a: {backend: malloc, size: 8MiB, listen: 'systemd:nbd'}}")
    runtime_dir = tmp_path / "run"
    code = f"""
import os, sys
first, second = {{fds}}
os.dup2(os.dup(second), 4, inheritable=True)
os.dup2(first, 3, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2', LISTEN_FDNAMES='nbd:nbd')
os.execv(sys.executable, [sys.executable, '-m', 'reactor', '--cores', '0', '--runtime-dir',
         {str(runtime_dir)!r}, '--config', {str(config)!r}])
"""
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX) as listener,
        (tmp_path / "log").open("wb") as log,
    ):
        listener.bind(str(path))
        listener.listen()
        # Numbers that the child's own 3 and 4 do not touch.
        fds = [fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD, 20) for sock in (tcp, listener)]
        process = subprocess.Popen(
            [sys.executable, "-c", code.format(fds=fds)],
            pass_fds=fds,
            stdin=subprocess.DEVNULL,
            stderr=log,
        )
        try:
            for fd in fds:
                os.close(fd)
            run("nbdinfo", "--size", f"nbd+unix:///a?socket={path}")
            run("nbdinfo", "--size", f"nbd://127.0.0.1:{tcp.getsockname()[1]}/a")
            worker = psutil.Process(process.pid).children()[0]
            worker.kill()
            run("nbdinfo", "--size", f"nbd+unix:///a?socket={path}")
        finally:
            process.terminate()
            assert process.wait(30) == 0
    assert path.exists(), "systemd's socket is not ours to remove"


def test_many_sockets_of_systemd_are_there_before_a_disk(tmp_path: Path) -> None:
    """More than the queue of a socket takes at once."""
    config = tmp_path / "activated.yaml"
    config.write_text("disks: {a: {backend: malloc, size: 8MiB, listen: 'systemd:n399'}}")
    count = 400
    code = f"""
import os, sys
for number in range({count}):
    os.dup2(500 + number, 3 + number, inheritable=True)
names = ':'.join(f'n{{number}}' for number in range({count}))
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='{count}', LISTEN_FDNAMES=names)
os.execv(sys.executable, [sys.executable, '-m', 'reactor', '--cores', '0', '--strict',
         '--runtime-dir', '{tmp_path}/run', '--config', {str(config)!r}])
"""
    with ExitStack() as stack:
        fds = range(500, 500 + count)
        for number, fd in enumerate(fds):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.bind(f"{tmp_path}/s{number}")
                sock.listen()
                os.dup2(sock.fileno(), fd)
            stack.callback(os.close, fd)
        process = subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=fds, stdin=subprocess.DEVNULL
        )
        try:
            run("nbdinfo", "--size", f"nbd+unix:///a?socket={tmp_path}/s399")
        finally:
            process.terminate()
            assert process.wait(30) == 0


# --- no kernel driver ---


@pytest.mark.skipif(Path("/sys/module/nbd").exists(), reason="this kernel has the nbd driver")
def test_without_the_driver_a_device_is_refused_with_the_cure(service: Start) -> None:
    running = service("disks: {a: {backend: malloc, size: 1MiB, device: /dev/nbd0}}")
    line = running.await_line("disk a failed:")
    assert line.endswith("the kernel has no nbd driver loaded; load it with: modprobe nbd")


def test_a_metrics_address_in_use_leaves_nothing_behind(service: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        running = service(None, "--metrics", address, await_ready=False)
        assert running.process.wait(30) == 1
    assert address in running.log.splitlines()[-1]
    assert not running.rpc_socket.exists()


# --- many wishes at once ---


def test_failing_creates_at_once_are_all_answered(service: Start) -> None:
    running = service()
    clients = []
    for number in range(8):
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(30)
        client.connect(str(running.rpc_socket))
        params = {"name": f"x{number}", "filename": "/absent", "block_size": 512}
        call = {"jsonrpc": "2.0", "id": 1, "method": "bdev_aio_create", "params": params}
        client.sendall(json.dumps(call).encode())
        clients.append(client)
    for client in clients:
        with client:
            assert b'"code":-2,' in client.recv(4096)
    assert running.rpc("reactor_get_disks") == []
    assert "Traceback" not in running.log
    assert running.rpc("bdev_malloc_create", num_blocks=2048, block_size=512) == "Malloc0"
    running.rpc("bdev_malloc_delete", name="Malloc0")


def test_a_reload_does_not_hold_up_a_stop(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a", "b"))
    running.process.send_signal(signal.SIGTERM)
    running.process.send_signal(signal.SIGHUP)
    assert running.stop() == 0

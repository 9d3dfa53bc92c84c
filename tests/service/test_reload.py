"""SIGHUP and `reload`: become what the config says, and disturb nothing that it does not name."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.running import RunningService
from tests.service.memory_disks import nbdsh, ram

Start = Callable[..., RunningService]
MIB = 1 << 20


def test_it_starts_stops_and_changes_only_what_differs(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "stays", "goes"))
    with socket.socket(socket.AF_UNIX) as stays:
        stays.connect(str(tmp_path / "stays.sock"))
        assert stays.recv(18).startswith(b"NBDMAGIC")
        running.config_path.write_text(ram(tmp_path, "stays", "comes"))
        running.process.send_signal(signal.SIGHUP)
        running.await_line("config reloaded")
        running.await_state("comes", "online")
        running.await_true(lambda: not (tmp_path / "goes.sock").exists())
        nbdsh(tmp_path, "comes", "h.pread(512, 0)")
        stays.setblocking(False)
        with pytest.raises(BlockingIOError):
            stays.recv(1)


def test_a_bad_config_changes_nothing(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    running.config_path.write_text("disks: {a: {backend: malloc, sise: 1}}")
    running.process.send_signal(signal.SIGHUP)
    running.await_line("config not reloaded")
    nbdsh(tmp_path, "a", "h.pread(512, 0)")


def test_a_memory_disk_is_resized_and_keeps_its_data(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'k' * 4096, 0)")
    running.config_path.write_text(ram(tmp_path, "a").replace("8MiB", "16MiB"))
    running.rpc("reactor_reload")
    running.await_true(lambda: running.rpc("reactor_get_disks", name="a")[0]["size"] == 16 * MIB)
    nbdsh(tmp_path, "a", "assert h.get_size() == 16 << 20; assert h.pread(4096, 0) == b'k' * 4096")


def test_an_unchanged_config_undoes_nothing_that_was_done_at_run_time(
    service: Start, tmp_path: Path
) -> None:
    image = tmp_path / "image"
    running = service(f"disks: {{f: {{backend: file, path: {image}, size: 4MiB}}}}")
    running.rpc("reactor_resize_disk", name="f", size=8 * MIB)
    running.rpc("reactor_reload")
    running.rpc("bdev_malloc_create", name="later", num_blocks=2048, block_size=512)
    running.rpc("reactor_reload")
    assert running.rpc("reactor_get_disks", name="f")[0]["size"] == 8 * MIB
    assert image.stat().st_size == 8 * MIB
    running.await_state("later", "online")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_disk_moves_to_another_core_with_its_data(service: Start, tmp_path: Path) -> None:
    first, second = sorted(os.sched_getaffinity(0))[:2]
    running = service(ram(tmp_path, "a", more=f", core: {first}"), cores=f"{first},{second}")
    nbdsh(tmp_path, "a", "h.pwrite(b'm' * 4096, 0)")
    running.config_path.write_text(ram(tmp_path, "a", more=f", core: {second}"))
    running.rpc("reactor_reload")

    def moved() -> bool:
        disks = running.rpc("reactor_get_disks")
        return [(disk["core"], disk["state"]) for disk in disks] == [(second, "online")]

    running.await_true(moved)
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'm' * 4096")


def test_a_disk_that_is_taken_out_and_put_back_at_once_comes_back(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a", "b"))
    running.config_path.write_text(ram(tmp_path, "b"))
    running.rpc("reactor_reload")
    running.config_path.write_text(ram(tmp_path, "a", "b"))
    running.rpc("reactor_reload")

    def both() -> bool:
        disks = running.rpc("reactor_get_disks")
        return sorted((disk["name"], disk["state"]) for disk in disks) == [
            ("a", "online"),
            ("b", "online"),
        ]

    running.await_true(both)
    nbdsh(tmp_path, "a", "h.pread(512, 0)")


def test_it_never_cuts_a_disk(service: Start, tmp_path: Path) -> None:
    image = tmp_path / "image"
    config = f"disks: {{f: {{backend: file, path: {image}, size: SIZE}}}}"
    running = service(config.replace("SIZE", "8MiB"))
    running.config_path.write_text(config.replace("SIZE", "4MiB"))
    running.rpc("reactor_reload")
    running.await_line("only `resize` cuts")
    assert running.await_state("f", "online")["size"] == 8 * MIB
    assert image.stat().st_size == 8 * MIB


def test_a_disk_whose_file_was_deleted_is_not_made_anew(service: Start, tmp_path: Path) -> None:
    image = tmp_path / "image"
    running = service(f"disks: {{f: {{backend: file, path: {image}, size: 8MiB}}}}")
    image.unlink()
    running.await_state("f", "removed")
    running.rpc("reactor_reload")
    running.await_state("f", "removed")
    assert not image.exists()


def test_a_change_that_is_cut_short_leaves_no_memory(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a", "b"))
    running.config_path.write_text(ram(tmp_path, "a", "b", more=", dead_timeout: 100"))
    running.rpc("reactor_reload")
    running.config_path.write_text(ram(tmp_path, "b", more=", dead_timeout: 100"))
    running.rpc("reactor_reload")
    running.await_true(lambda: [d["name"] for d in running.rpc("reactor_get_disks")] == ["b"])
    instance = (running.runtime_dir / "instance").read_text().strip()
    assert not Path(f"/dev/shm/nbd-reactor-{instance}-a").exists()
    running.config_path.write_text(ram(tmp_path, "b", more=", dead_timeout: 101"))
    running.rpc("reactor_reload")
    assert running.stop() == 0


def test_the_last_of_several_sizes_counts(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    for size in ("16MiB", "32MiB", "64MiB"):
        running.config_path.write_text(ram(tmp_path, "a").replace("8MiB", size))
        running.rpc("reactor_reload")
    running.await_true(lambda: running.rpc("reactor_get_disks", name="a")[0]["size"] == 64 * MIB)


def test_another_address_is_taken_in_place(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'k' * 4096, 0)")
    wrong, right = tmp_path / "none" / "a.sock", tmp_path / "other.sock"
    config = running.config_path.read_text()
    running.config_path.write_text(config.replace(f"{tmp_path}/a.sock", str(wrong)))
    running.rpc("reactor_reload")
    running.await_true(lambda: "not served everywhere" in shown(running, "a"))
    running.config_path.write_text(
        config.replace(f"{tmp_path}/a.sock", str(right)).replace("8MiB", "16MiB")
    )
    running.rpc("reactor_reload")
    running.await_true(right.exists)
    running.await_true(lambda: running.rpc("reactor_get_disks", name="a")[0]["size"] == 16 * MIB)
    running.await_true(lambda: shown(running, "a") == "")
    nbdsh(tmp_path, "a", "assert h.pread(4096, 0) == b'k' * 4096", on="other")
    assert "made anew" not in running.log


def test_an_address_that_stays_is_left_alone_also_when_another_cannot_be_had(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a"))
    config, stays = running.config_path.read_text(), f"unix:{tmp_path}/a.sock"
    place = tmp_path / "place"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "a.sock"))
        for more in (f"unix:{place}/b.sock", f"unix:{tmp_path}/c.sock"):
            running.config_path.write_text(config.replace(f"'{stays}'", f"['{stays}', '{more}']"))
            running.rpc("reactor_reload")
            if place.name in more:
                running.await_true(lambda: "not served everywhere" in shown(running, "a"))
                nbdsh(tmp_path, "a", "h.pread(512, 0)")
        running.await_true((tmp_path / "c.sock").exists)
        running.await_true(lambda: shown(running, "a") == "")
        client.settimeout(5)
        assert client.recv(18).startswith(b"NBDMAGIC"), "it waited for its greeting all the time"
        client.sendall(bytes(3) + b"\x03")
        client.setblocking(False)
        with pytest.raises(BlockingIOError):
            client.recv(1)


def shown(running: RunningService, name: str) -> str:
    reason: str = running.rpc("reactor_get_disks", name=name)[0]["reason"]
    return reason


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_an_address_that_another_disk_has_is_shared_by_one_worker(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a", "b"), cores=cores_of_two())
    nbdsh(tmp_path, "b", "h.pwrite(b'k' * 4096, 0)")
    config = running.config_path.read_text()
    running.config_path.write_text(config.replace("b.sock", "a.sock"))
    running.rpc("reactor_reload")

    def together() -> bool:
        disks = running.rpc("reactor_get_disks")
        return {disk["state"] for disk in disks} == {"online"} and len(
            {disk["core"] for disk in disks}
        ) == 1

    running.await_true(together)
    nbdsh(tmp_path, "b", "assert h.pread(4096, 0) == b'k' * 4096", on="a")


def cores_of_two() -> str:
    return ",".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


def test_a_reload_whose_controller_dies_is_made_up_for(service: Start, tmp_path: Path) -> None:
    names = [f"d{number}" for number in range(60)]
    running = service(ram(tmp_path, *names))
    config = running.config_path.read_text()
    running.config_path.write_text(config.replace("8MiB", "8MiB, readonly: true"))
    running.process.send_signal(signal.SIGHUP)
    running.await_line("is stopped, and made anew")
    running.process.kill()
    running.process.wait()
    again = service(
        running.config_path.read_text(), runtime_dir=running.runtime_dir, await_ready=False
    )
    again.await_line("ready: 60 of 60")
    again.await_true(
        lambda: all(
            disk["readonly"] and disk["state"] == "online"
            for disk in again.rpc("reactor_get_disks")
        )
    )


def pinned(tmp_path: Path, **addresses: tuple[int, str]) -> str:
    """Return a config of memory disks, each with the index of its core and its socket."""
    cores = sorted(os.sched_getaffinity(0))
    lines = (
        f"  {name}: {{backend: malloc, size: 8MiB, core: {cores[core]},"
        f" listen: 'unix:{tmp_path}/{sock}.sock'}}\n"
        for name, (core, sock) in addresses.items()
    )
    return f"disks:\n{''.join(lines)}"


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_two_disks_exchange_their_addresses(service: Start, tmp_path: Path) -> None:
    running = service(pinned(tmp_path, a=(0, "x"), b=(1, "y")), cores=cores_of_two())
    for name, sock in (("a", "x"), ("b", "y")):
        nbdsh(tmp_path, name, f"h.pwrite(b'{name}' * 4096, 0)", on=sock)
    running.config_path.write_text(pinned(tmp_path, a=(0, "y"), b=(1, "x")))
    running.rpc("reactor_reload")
    for name, sock in (("a", "y"), ("b", "x")):
        running.await_state(name, "online")  # first: before that nothing is known to lack
        running.await_true(lambda name=name: shown(running, name) == "")
        nbdsh(tmp_path, name, f"assert h.pread(4096, 0) == b'{name}' * 4096", on=sock)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_stopped_disk_stays_so_when_its_address_goes_to_another_core(
    service: Start, tmp_path: Path
) -> None:
    first, second = (pinned(tmp_path, a=(core, "x")) for core in (0, 1))
    other = ram(tmp_path, "x").removeprefix("disks:\n").replace("  x:", "  b:")
    running = service(first + other, cores=cores_of_two())
    running.rpc("reactor_stop_disk", name="b")
    running.config_path.write_text(second + other)
    running.rpc("reactor_reload")
    running.await_line("disk a is stopped, and made anew")
    running.await_state("a", "online")
    running.await_state("b", "stopped")
    running.rpc("reactor_start_disk", name="b")
    running.await_state("b", "online")
    nbdsh(tmp_path, "b", "h.pread(512, 0)", on="x")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_new_disk_has_the_address_of_one_that_goes(service: Start, tmp_path: Path) -> None:
    running = service(pinned(tmp_path, a=(0, "x")), cores=cores_of_two())
    running.config_path.write_text(pinned(tmp_path, n=(1, "x")))
    running.rpc("reactor_reload")
    running.await_state("n", "online")
    nbdsh(tmp_path, "n", "h.pread(4096, 0)", on="x")


def test_what_the_config_forgot_while_nobody_read_it_is_not_its_own(
    service: Start, tmp_path: Path
) -> None:
    running = service(ram(tmp_path, "a", "b"))
    running.rpc("reactor_remove_disk", name="b")
    running.process.kill()
    running.process.wait()
    again = service(ram(tmp_path, "a"), runtime_dir=running.runtime_dir)
    again.rpc("bdev_malloc_create", name="b", num_blocks=2048, block_size=512)
    again.rpc("reactor_reload")
    again.await_state("b", "online")


def test_storage_belongs_to_the_disk_that_had_it_first(service: Start, tmp_path: Path) -> None:
    """A disk that is made at run time on the image of another never gets it."""
    image = tmp_path / "image"
    first = f"  a: {{backend: file, path: {image}, size: 8MiB}}"
    running = service(f"disks:\n{first}\n")
    keys = {"backend": "file", "path": str(image)}
    refusal = running.rpc_raw("reactor_start_disk", name="b", keys=keys)["error"]["message"]
    assert refusal == f"{image} is in use by disk a"
    running.rpc("reactor_stop_disk", name="a")
    running.rpc("reactor_start_disk", name="b", keys=keys)
    refusal = running.rpc_raw("reactor_start_disk", name="a")["error"]["message"]
    assert refusal == f"{image} is in use by disk b"
    for process in (running.process, *running.workers().values()):
        process.kill()
    running.process.wait()
    again = service(running.config_path.read_text(), runtime_dir=running.runtime_dir)
    assert again.await_state("b", "online")
    assert again.await_state("a", "failed")["reason"] == f"{image} is in use by disk b"


def test_disks_that_are_tied_by_a_third_come_up_at_the_first_start(
    service: Start, tmp_path: Path
) -> None:
    sockets = {"a": "1", "b": "2", "c": "12"}
    lines = (
        f"  {name}: {{backend: malloc, size: 1MiB, listen: ["
        + ", ".join(f"'unix:{tmp_path}/{sock}.sock'" for sock in socks)
        + "]}\n"
        for name, socks in sockets.items()
    )
    running = service(f"disks:\n{''.join(lines)}")
    assert {disk["state"] for disk in running.rpc("reactor_get_disks")} == {"online"}


def test_a_stopped_disk_stays_stopped_whatever_is_changed(service: Start, tmp_path: Path) -> None:
    running = service(ram(tmp_path, "a"))
    nbdsh(tmp_path, "a", "h.pwrite(b'k' * 4096, 0)")
    running.rpc("reactor_stop_disk", name="a")
    for old, new in (
        ("a.sock", "b.sock"),
        ("8MiB", "16MiB"),
        ("malloc,", "malloc, readonly: true,"),
    ):
        config = running.config_path.read_text()
        running.config_path.write_text(config.replace(old, new))
        running.rpc("reactor_reload")
        running.await_state("a", "stopped")
    running.process.kill()
    running.process.wait()
    again = service(running.config_path.read_text(), runtime_dir=running.runtime_dir)
    again.await_state("a", "stopped")
    again.rpc("reactor_start_disk", name="a")
    script = "assert h.get_size() == 16 << 20; assert h.pread(4096, 0) == b'k' * 4096"
    nbdsh(tmp_path, "a", f"{script}; assert h.is_read_only()", on="b")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_start_finds_new_owners_of_addresses(service: Start, tmp_path: Path) -> None:
    """Of one that moves to another address, and of one that goes."""
    running = service(
        pinned(tmp_path, a=(0, "x"), gone=(0, "z"), other=(0, "o")), cores=cores_of_two()
    )
    workers = {worker.pid for worker in running.workers().values()}
    running.process.kill()
    running.process.wait()
    again = service(
        pinned(tmp_path, a=(0, "y"), n=(1, "x"), m=(1, "z"), other=(0, "o")),
        cores=cores_of_two(),
        runtime_dir=running.runtime_dir,
    )
    for name, sock in (("a", "y"), ("n", "x"), ("m", "z"), ("other", "o")):
        again.await_state(name, "online")
        again.await_true(lambda name=name: shown(again, name) == "")
        nbdsh(tmp_path, name, "h.pread(4096, 0)", on=sock)
    assert {worker.pid for worker in again.workers().values()} == workers


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_a_second_reload_at_once_changes_nothing(service: Start, tmp_path: Path) -> None:
    running = service(pinned(tmp_path, a=(0, "x")), cores=cores_of_two())
    running.config_path.write_text(pinned(tmp_path, a=(1, "x")))
    for _ in range(2):
        running.rpc("reactor_reload")
    running.await_state("a", "online")
    (disk,) = running.rpc("reactor_get_disks")
    assert disk["core"] == sorted(os.sched_getaffinity(0))[1]

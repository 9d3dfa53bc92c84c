"""SPDK's own client drives the service."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from spdk.rpc.client import JSONRPCClient, JSONRPCException

from tests.running import RunningService
from tests.spdk import spdk_rpc

Start = Callable[..., RunningService]

MIB = 1 << 20


@pytest.fixture
def running(service: Start) -> RunningService:
    return service()


@pytest.fixture
def client(running: RunningService) -> Iterator[Any]:
    connected = JSONRPCClient(str(running.rpc_socket))
    yield connected
    connected.close()


def test_disks_are_made_listed_and_deleted(running: RunningService, tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 * MIB))
    assert spdk_rpc(running, "bdev_malloc_create", "16", "512") == "Malloc0\n"
    assert spdk_rpc(running, "bdev_malloc_create", "-b", "ram", "16", "4096") == "ram\n"
    assert spdk_rpc(running, "bdev_null_create", "nil", "1024", "512") == "nil\n"
    assert spdk_rpc(running, "bdev_aio_create", str(image), "img", "512") == "img\n"
    bdevs = json.loads(spdk_rpc(running, "bdev_get_bdevs"))
    assert [(b["name"], b["product_name"], b["num_blocks"] * b["block_size"]) for b in bdevs] == [
        ("Malloc0", "Malloc disk", 16 * MIB),
        ("ram", "Malloc disk", 16 * MIB),
        ("nil", "Null disk", 1024 * MIB),
        ("img", "AIO disk", 8 * MIB),
    ]
    spdk_rpc(running, "bdev_null_resize", "nil", "2048")
    [nil] = json.loads(spdk_rpc(running, "bdev_get_bdevs", "-b", bdevs[2]["uuid"]))
    assert nil["num_blocks"] * 512 == 2048 * MIB
    assert spdk_rpc(running, "bdev_malloc_delete", "Malloc0") == ""
    spdk_rpc(running, "bdev_malloc_delete", "ram")
    spdk_rpc(running, "bdev_null_delete", "nil")
    spdk_rpc(running, "bdev_aio_delete", "img")
    assert json.loads(spdk_rpc(running, "bdev_get_bdevs")) == []
    assert image.stat().st_size == 8 * MIB, "deleting a bdev leaves its file alone"


FAILURES = [
    (["bdev_malloc_create", "-b", "taken", "1", "512"], -17),
    (["bdev_malloc_create", "1", "1000"], -22),
    (["bdev_malloc_delete", "absent"], -19),
    (["bdev_null_delete", "taken"], -19),
    (["bdev_null_resize", "taken", "1"], -22),
    (["bdev_aio_create", "/absent/disk.img", "img"], -2),
    (["bdev_get_bdevs", "-b", "absent"], -19),
    (["nbd_start_disk", "absent", "/dev/nbd0"], -19),
    (["nbd_start_disk", "taken", "/dev/sda"], -19),
    (["nbd_stop_disk", "/dev/nbd0"], -19),
    (["nbd_get_disks", "-n", "/dev/nbd0"], -19),
    (["bdev_raid_get_bdevs", "all"], -32601),
]


def test_failures_have_spdks_codes_and_leave_nothing_behind(running: RunningService) -> None:
    spdk_rpc(running, "bdev_malloc_create", "-b", "taken", "1", "512")
    for command, code in FAILURES:
        told = spdk_rpc(running, *command, status=1)
        assert "Got JSON-RPC error response" in told
        assert json.loads(told.rpartition("response:\n")[2])["code"] == code, command
    assert len(running.rpc("reactor_get_disks")) == 1


def test_the_helpers_of_spdks_tests_work(running: RunningService) -> None:
    assert "bdev_malloc_create" in json.loads(spdk_rpc(running, "-t", "1", "rpc_get_methods"))
    assert spdk_rpc(running, "bdev_wait_for_examine") == ""
    assert json.loads(spdk_rpc(running, "spdk_get_version"))["fields"]["major"] == 26
    assert json.loads(spdk_rpc(running, "nbd_get_disks")) == []


def test_a_script_runs_on_one_connection(running: RunningService) -> None:
    script = "bdev_malloc_create 4 512\nbdev_malloc_create 4 512\nbdev_malloc_delete Malloc0\n"
    assert spdk_rpc(running, script=script).split() == ["Malloc0", "Malloc1"]


def test_a_batch_is_answered_as_one(running: RunningService) -> None:
    script = "bdev_malloc_create 4 512\nbdev_null_create nil 4 512\nnbd_get_disks\n"
    printed = spdk_rpc(running, "-b", script=script)
    assert printed.splitlines()[-3:] == ['"Malloc0"', '"nil"', "[]"]


def test_a_configuration_is_loaded(running: RunningService) -> None:
    entries = [
        {
            "method": "bdev_malloc_create",
            "params": {"name": "m", "num_blocks": 8, "block_size": 512},
        },
        {"method": "bdev_null_create", "params": {"name": "n", "num_blocks": 8, "block_size": 512}},
        {"method": "bdev_wait_for_examine"},
    ]
    config = {"subsystems": [{"subsystem": "bdev", "config": entries}]}
    spdk_rpc(running, "load_config", script=json.dumps(config))
    assert [bdev["name"] for bdev in running.rpc("bdev_get_bdevs")] == ["m", "n"]


def test_the_client_library_gets_large_answers_whole(running: RunningService, client: Any) -> None:
    names = [f"nil{number}" for number in range(60)]
    for name in names:
        assert client.bdev_null_create(name=name, num_blocks=8, block_size=512) == name
    assert [bdev["name"] for bdev in client.bdev_get_bdevs()] == names
    with pytest.raises(JSONRPCException, match="File exists"):
        client.bdev_null_create(name="nil0", num_blocks=8, block_size=512)


def test_many_idle_connections_are_no_harm(running: RunningService) -> None:
    clients = [JSONRPCClient(str(running.rpc_socket)) for _ in range(60)]
    assert all(client.nbd_get_disks() == [] for client in clients)
    for client in clients:
        client.close()


def test_the_service_is_stopped_by_a_signal_over_rpc(running: RunningService) -> None:
    assert spdk_rpc(running, "spdk_kill_instance", "SIGTERM") == ""
    assert running.process.wait(60) == 0

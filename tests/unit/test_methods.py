"""What each RPC method takes, gives and refuses, in SPDK's codes and texts."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reactor.errors import DeviceError, ReactorError
from tests.unit.rpc_running import RunningRpc, encode

DECODE_FAILED = {"code": -32603, "message": "spdk_json_decode_object failed"}
MALLOC = {"num_blocks": 2048, "block_size": 512}
UUID = "0ae0d2b8-97a4-4a3a-9a4b-1ee4ab3b9d61"


def failure(number: int) -> dict[str, Any]:
    return {"code": -number, "message": os.strerror(number)}


@pytest.fixture
def running(tmp_path: Path) -> Iterator[RunningRpc]:
    with RunningRpc(tmp_path / "rpc.sock") as started:
        yield started


def result(running: RunningRpc, method: str, **params: Any) -> Any:
    reply = running.call(method, params or None)
    assert "error" not in reply, reply
    return reply["result"]


def error(running: RunningRpc, method: str, params: Any = None) -> Any:
    reply = running.call(method, params)
    assert "result" not in reply, reply
    return reply["error"]


# --- parameters ---


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("nbd_start_disk", None),
        ("nbd_start_disk", {}),
        ("nbd_start_disk", ["Malloc0"]),
        ("nbd_start_disk", {"bdev_name": 1}),
        ("nbd_start_disk", {"bdev_name": None}),
        ("nbd_start_disk", {"bdev_name": "a\0"}),
        ("nbd_start_disk", {"bdev_name": "\ud800"}),
        ("nbd_start_disk", {"bdev_name": "a", "more": 1}),
        ("nbd_stop_disk", {}),
        ("bdev_get_bdevs", {"timeout": -1}),
        ("bdev_get_bdevs", {"timeout": 1 << 64}),
        ("bdev_malloc_create", {"num_blocks": 1}),
        ("bdev_malloc_create", {**MALLOC, "num_blocks": True}),
        ("bdev_malloc_create", {**MALLOC, "num_blocks": 1.5}),
        ("bdev_malloc_create", {**MALLOC, "num_blocks": "2048"}),
        ("bdev_malloc_create", {**MALLOC, "block_size": 1 << 32}),
        ("bdev_malloc_create", {**MALLOC, "md_interleave": 0}),
        ("bdev_malloc_create", {**MALLOC, "uuid": "x"}),
        ("bdev_malloc_create", {**MALLOC, "uuid": UUID.replace("-", "")}),
        ("bdev_null_create", MALLOC),
        ("bdev_aio_create", {"name": "a"}),
    ],
)
def test_wrong_parameters_are_refused_in_spdks_words(
    running: RunningRpc, method: str, params: Any
) -> None:
    assert error(running, method, params) == DECODE_FAILED


def test_a_repeated_parameter_is_refused(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(b'{"id":1,"method":"bdev_get_bdevs","params":{"name":"a","name":"b"}}')
        assert client.reply()["error"] == DECODE_FAILED


def test_whole_numbers_may_be_written_as_floats(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(
            b'{"id":1,"method":"bdev_malloc_create","params":{"num_blocks":2e3,"block_size":512.0}}'
        )
        assert client.reply()["result"] == "Malloc0"
    assert result(running, "bdev_get_bdevs")[0]["num_blocks"] == 2000


@pytest.mark.parametrize(
    ("method", "text"),
    [
        ("spdk_get_version", "spdk_get_version method requires no parameters"),
        ("bdev_wait_for_examine", "bdev_wait_for_examine requires no parameters"),
    ],
)
def test_methods_without_parameters_take_not_even_an_empty_object(
    running: RunningRpc, method: str, text: str
) -> None:
    assert error(running, method, {}) == {"code": -32602, "message": text}
    assert "result" in running.call(method)


def test_own_methods_say_what_is_wrong_with_a_parameter(running: RunningRpc) -> None:
    for params, text in [
        ({}, "parameter name is missing"),
        ({"name": "a", "size": 0}, "parameter size must be a whole number from 1 to"),
        ({"name": "a", "size": 1, "x": 1}, 'unknown parameter "x"; there are: name, size'),
        ([1], "parameters must be an object"),
    ]:
        refused = error(running, "reactor_resize_disk", params)
        assert refused["code"] == -32602
        assert text in refused["message"]


# --- bdevs ---


def test_a_memory_disk_without_a_name_is_numbered_and_no_number_comes_twice(
    running: RunningRpc,
) -> None:
    assert result(running, "bdev_malloc_create", **MALLOC) == "Malloc0"
    assert result(running, "bdev_malloc_create", **MALLOC, name="Malloc2") == "Malloc2"
    assert result(running, "bdev_malloc_delete", name="Malloc0") is True
    assert result(running, "bdev_malloc_create", **MALLOC) == "Malloc1"
    assert result(running, "bdev_malloc_create", **MALLOC) == "Malloc3"


def test_a_bdev_is_described_with_all_of_spdks_keys(running: RunningRpc, tmp_path: Path) -> None:
    result(running, "bdev_malloc_create", **MALLOC, name="m", uuid=UUID.upper())
    path = str(tmp_path / "disk")
    result(running, "bdev_aio_create", name="a", filename=path, block_size=4096, readonly=True)
    malloc, aio = result(running, "bdev_get_bdevs")
    assert list(malloc) == [
        *("name", "aliases", "product_name", "block_size", "num_blocks"),
        *("preferred_write_alignment", "preferred_write_granularity", "optimal_write_size"),
        *("preferred_unmap_alignment", "preferred_unmap_granularity", "uuid"),
        *("assigned_rate_limits", "claimed", "zoned", "supported_io_types", "driver_specific"),
    ]
    assert (malloc["name"], malloc["uuid"], malloc["aliases"]) == ("m", UUID, [UUID])
    assert (malloc["product_name"], malloc["block_size"], malloc["num_blocks"]) == (
        "Malloc disk",
        512,
        2048,
    )
    assert len(malloc["supported_io_types"]) == 22
    assert malloc["supported_io_types"]["write"] is True
    assert aio["supported_io_types"]["write"] is False
    assert aio["driver_specific"]["aio"] == {
        "filename": path,
        "block_size_override": True,
        "readonly": True,
        "fallocate": True,
        "nowait": False,
    }


def test_a_bdev_is_found_by_name_and_by_uuid(running: RunningRpc) -> None:
    result(running, "bdev_null_create", **MALLOC, name="n")
    [found] = result(running, "bdev_get_bdevs", name="n")
    assert uuid.UUID(found["uuid"]).version == 5
    assert result(running, "bdev_get_bdevs", name=found["uuid"]) == [found]
    result(running, "bdev_null_delete", name="n")
    result(running, "bdev_null_create", **MALLOC, name="n")
    assert result(running, "bdev_get_bdevs", name="n") == [found], "the UUID follows the name"


def test_an_absent_bdev_is_an_error_at_once_or_after_the_timeout(running: RunningRpc) -> None:
    assert error(running, "bdev_get_bdevs", {"name": "n"}) == failure(errno.ENODEV)
    waited = {"name": "n", "timeout": 150}
    assert error(running, "bdev_get_bdevs", waited) == failure(errno.ETIMEDOUT)


def test_a_bdev_is_waited_for(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(encode("bdev_get_bdevs", {"name": "n", "timeout": 20_000}, 1))
        client.send(encode("bdev_null_create", {**MALLOC, "name": "n"}, 2))
        assert client.reply() == {"jsonrpc": "2.0", "id": 2, "result": "n"}
        assert client.reply()["result"][0]["name"] == "n"


def test_what_follows_a_create_finds_the_bdev(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(
            encode("bdev_null_create", {**MALLOC, "name": "n"}, 1)
            + encode("nbd_start_disk", {"bdev_name": "n"}, 2)
        )
        assert client.reply()["result"] == "n"
        assert client.reply()["result"] == "/dev/nbd0"


@pytest.mark.parametrize(
    ("params", "number"),
    [
        ({"num_blocks": 0}, errno.EINVAL),
        ({"block_size": 0}, errno.EINVAL),
        ({"block_size": 1000}, errno.EINVAL),
        ({"block_size": 1536}, errno.EINVAL),
        ({"num_blocks": (1 << 64) - 1, "block_size": 4096}, errno.ENOMEM),
        ({"md_size": 7}, errno.EINVAL),
        ({"md_size": 8}, errno.EOPNOTSUPP),
        ({"dif_type": 1}, errno.EOPNOTSUPP),
        ({"numa_id": 9999}, errno.EINVAL),
        ({"name": "taken"}, errno.EEXIST),
        ({"name": UUID}, errno.EEXIST),
        ({"uuid": UUID}, errno.EEXIST),
    ],
)
def test_an_impossible_memory_disk_is_refused_with_its_errno(
    running: RunningRpc, params: dict[str, Any], number: int
) -> None:
    result(running, "bdev_malloc_create", **MALLOC, name="taken", uuid=UUID)
    assert error(running, "bdev_malloc_create", {**MALLOC, **params}) == failure(number)
    assert len(result(running, "bdev_get_bdevs")) == 1


def test_a_name_that_cannot_be_served_is_refused(running: RunningRpc) -> None:
    for name in ("", "../x", "a b", "x" * 200):
        refused = error(running, "bdev_null_create", {**MALLOC, "name": name})
        assert refused["code"] == -errno.EINVAL


def test_flags_that_spdks_client_always_sends_are_accepted(running: RunningRpc) -> None:
    flags = {"md_interleave": False, "dif_is_head_of_md": False}
    assert result(running, "bdev_malloc_create", **MALLOC, **flags) == "Malloc0"
    flags = {"readonly": False, "fallocate": False, "nowait": False}
    assert result(running, "bdev_aio_create", name="a", filename="/x", **flags) == "a"
    assert result(running, "rpc_get_methods", current=False, include_aliases=False)


def test_a_file_disk_has_an_absolute_path(running: RunningRpc) -> None:
    result(running, "bdev_aio_create", name="a", filename="disk.img")
    [bdev] = result(running, "bdev_get_bdevs", name="a")
    assert bdev["driver_specific"]["aio"]["filename"] == f"{Path.cwd()}/disk.img"


def test_a_device_of_ours_cannot_back_a_disk(running: RunningRpc) -> None:
    result(running, "bdev_null_create", **MALLOC, name="n")
    result(running, "nbd_start_disk", bdev_name="n", nbd_device="/dev/nbd0")
    refused = error(running, "bdev_aio_create", {"name": "a", "filename": "/dev/../dev/nbd0"})
    assert refused == failure(errno.EBUSY)


@pytest.mark.parametrize("size", [100, 512 + 256, 3 * 512, 1 << 17])
def test_a_file_disk_of_an_impossible_block_size_is_refused(running: RunningRpc, size: int) -> None:
    params = {"name": "a", "filename": "/x", "block_size": size}
    assert error(running, "bdev_aio_create", params) == failure(errno.EINVAL)


def test_the_errno_of_the_backend_reaches_the_client(running: RunningRpc) -> None:
    running.service.errors["create"] = OSError(errno.ENOENT, "/x: not there, my friend")
    params = {"name": "a", "filename": "/x"}
    assert error(running, "bdev_aio_create", params) == failure(errno.ENOENT)


@pytest.mark.parametrize("kind", ["malloc", "null", "aio"])
def test_deleting_takes_only_its_own_kind(running: RunningRpc, kind: str) -> None:
    result(running, "bdev_malloc_create", **MALLOC, name="malloc")
    result(running, "bdev_null_create", **MALLOC, name="null")
    result(running, "bdev_aio_create", name="aio", filename="/x")
    for name in ("malloc", "null", "aio", "absent"):
        if name != kind:
            refused = error(running, f"bdev_{kind}_delete", {"name": name})
            assert refused == failure(errno.ENODEV)
    assert result(running, f"bdev_{kind}_delete", name=kind) is True
    assert len(result(running, "bdev_get_bdevs")) == 2


def test_deleting_is_answered_when_the_disk_is_released(running: RunningRpc) -> None:
    result(running, "bdev_null_create", **MALLOC, name="n")
    running.service.held = []
    with running.client() as client:
        client.send(encode("bdev_null_delete", {"name": "n"}, 1) + encode("nbd_get_disks", None, 2))
        assert client.reply()["id"] == 2, "the delete is not answered"
        running.in_loop(running.service.held.pop())
        assert client.reply() == {"jsonrpc": "2.0", "id": 1, "result": True}


def test_a_null_disk_grows_in_mebibytes_and_never_shrinks(running: RunningRpc) -> None:
    result(running, "bdev_null_create", **MALLOC, name="n")
    result(running, "bdev_malloc_create", **MALLOC, name="m")
    assert result(running, "bdev_null_resize", name="n", new_size=4) is True
    assert result(running, "bdev_get_bdevs", name="n")[0]["num_blocks"] == (4 << 20) // 512
    for name, size, number in [
        ("n", 3, errno.EINVAL),
        ("n", 1 << 60, errno.EINVAL),
        ("m", 8, errno.EINVAL),
        ("x", 8, errno.ENODEV),
    ]:
        params = {"name": name, "new_size": size}
        assert error(running, "bdev_null_resize", params) == failure(number)


# --- nbd ---


def test_a_disk_is_attached_listed_and_detached(running: RunningRpc) -> None:
    for name in ("a", "b"):
        result(running, "bdev_null_create", **MALLOC, name=name)
    assert result(running, "nbd_start_disk", bdev_name="a", nbd_device="/dev/nbd1") == "/dev/nbd1"
    assert result(running, "nbd_start_disk", bdev_name="b") == "/dev/nbd0", "the first free one"
    first = {"nbd_device": "/dev/nbd1", "bdev_name": "a"}
    assert result(running, "nbd_get_disks")[0] == first
    assert result(running, "nbd_get_disks", nbd_device="/dev/nbd1") == [first]
    assert result(running, "nbd_stop_disk", nbd_device="/dev/nbd1") is True
    assert error(running, "nbd_get_disks", {"nbd_device": "/dev/nbd1"}) == failure(errno.ENODEV)


@pytest.mark.parametrize(
    "path",
    ["/dev/nbd", "/dev/nbd01", "/dev/nbd0p1", "/dev/sda", "nbd0", "", "/dev/nbd0\n", "/dev/nbd٣"],
)
def test_an_illegal_device_is_named(running: RunningRpc, path: str) -> None:
    result(running, "bdev_null_create", **MALLOC, name="n")
    params = {"bdev_name": "n", "nbd_device": path}
    refused = error(running, "nbd_start_disk", params)
    assert refused == {"code": -errno.ENODEV, "message": f"illegal nbd device {path}"}


def test_starting_is_refused_as_spdk_does(running: RunningRpc) -> None:
    start = "nbd_start_disk"
    assert error(running, start, {"bdev_name": "n"}) == failure(errno.ENODEV)
    for name in ("a", "b", "c"):
        result(running, "bdev_null_create", **MALLOC, name=name)
    result(running, start, bdev_name="a", nbd_device="/dev/nbd0")
    again = {"bdev_name": "a", "nbd_device": "/dev/nbd0"}
    assert error(running, start, again) == failure(errno.EBUSY)
    result(running, start, bdev_name="b")
    none_free = {"code": -errno.ENODEV, "message": "nbd device not found"}
    assert error(running, start, {"bdev_name": "c"}) == none_free
    assert error(running, "nbd_stop_disk", {"nbd_device": "/dev/nbd9"}) == failure(errno.ENODEV)


def test_why_a_device_cannot_be_attached_is_told(running: RunningRpc) -> None:
    result(running, "bdev_null_create", **MALLOC, name="n")
    why = "the kernel has no nbd driver; run modprobe nbd"
    running.service.errors["attach"] = DeviceError(errno.ENXIO, why)
    refused = error(running, "nbd_start_disk", {"bdev_name": "n"})
    assert refused == {"code": -errno.ENXIO, "message": why}


# --- the process ---


def test_all_methods_are_listed(running: RunningRpc) -> None:
    listed = result(running, "rpc_get_methods")
    assert {"nbd_start_disk", "bdev_aio_delete", "rpc_get_methods", "reactor_reload"} <= set(listed)
    assert error(running, "rpc_get_methods", {"current": 1}) == {
        "code": -32602,
        "message": "Invalid parameters",
    }


def test_the_version_has_spdks_fields(running: RunningRpc) -> None:
    version = result(running, "spdk_get_version")
    fields = version["fields"]
    assert list(fields) == ["major", "minor", "patch", "suffix"]
    assert version["version"] == f"SPDK v{fields['major']}.{fields['minor']:02}{fields['suffix']}"


def test_an_unknown_signal_is_refused(running: RunningRpc) -> None:
    for name in ("TERM", "0", "SIGSTOP", ""):
        refused = error(running, "spdk_kill_instance", {"sig_name": name})
        assert refused == {"code": -32602, "message": "Invalid parameters"}


# --- own methods ---


def test_a_disk_is_made_of_the_keys_of_the_config(running: RunningRpc) -> None:
    keys = {"backend": "malloc", "size": "2MiB", "block_size": 4096, "readonly": True}
    assert result(running, "reactor_start_disk", name="d", keys=keys) is True
    [disk] = result(running, "reactor_get_disks", name="d")
    assert (disk["state"], disk["size"], disk["block_size"], disk["readonly"]) == (
        "online",
        2 << 20,
        4096,
        True,
    )
    config = "disks: d: backend: malloc size: 2MiB readonly: true block_size: 4096"
    assert disk["config"].split() == config.split()
    assert (disk["core"], disk["pid"]) == (0, 4242)


def test_every_problem_of_the_keys_is_told_at_once(running: RunningRpc) -> None:
    keys = {"backend": "malloc", "size": "x", "redonly": [[{"a": 1}]]}
    refused = error(running, "reactor_start_disk", {"name": "d", "keys": keys})
    assert refused["code"] == -32602
    assert '"x" is not a size' in refused["message"]
    assert 'did you mean "readonly"?' in refused["message"]


def test_a_repeated_key_is_refused(running: RunningRpc) -> None:
    with running.client() as client:
        client.send(
            b'{"id":1,"method":"reactor_start_disk",'
            b'"params":{"name":"d","keys":{"backend":"null","backend":"null"}}}'
        )
        refused = client.reply()["error"]
        assert refused == {"code": -32602, "message": "parameter keys must be an object"}


@pytest.mark.parametrize("verb", ["start", "stop", "remove"])
def test_an_absent_disk_is_named(running: RunningRpc, verb: str) -> None:
    refused = error(running, f"reactor_{verb}_disk", {"name": "d"})
    assert refused == {"code": -errno.ENODEV, "message": "there is no disk d"}


def test_a_disk_goes_through_its_life(running: RunningRpc) -> None:
    result(running, "bdev_malloc_create", **MALLOC, name="d")
    for verb, state in [("stop", "stopped"), ("start", "online")]:
        assert result(running, f"reactor_{verb}_disk", name="d") is True
        assert result(running, "reactor_get_disks", name="d")[0]["state"] == state
    assert result(running, "reactor_resize_disk", name="d", size=4 << 20) is True
    assert result(running, "reactor_get_disks")[0]["size"] == 4 << 20
    uneven = error(running, "reactor_resize_disk", {"name": "d", "size": 1000})
    assert uneven["message"] == "1000 is not a multiple of the block size, 512"
    assert result(running, "reactor_remove_disk", name="d") is True
    assert result(running, "reactor_get_disks") == []


def test_a_stopped_disk_is_no_bdev(running: RunningRpc) -> None:
    result(running, "bdev_malloc_create", **MALLOC, name="d")
    result(running, "reactor_stop_disk", name="d")
    assert result(running, "bdev_get_bdevs") == []
    taken = error(running, "bdev_null_create", {**MALLOC, "name": "d"})
    assert taken == failure(errno.EEXIST)


def test_the_service_sums_itself_up(running: RunningRpc) -> None:
    result(running, "bdev_malloc_create", **MALLOC, name="d")
    status = result(running, "reactor_get_status")
    assert status["pid"] == os.getpid()
    assert status["disks"] == {"online": 1}
    assert status["workers"] == {"running": 1}
    assert result(running, "reactor_get_workers")[0]["disks"] == ["d"]


def test_a_reload_that_fails_says_why(running: RunningRpc) -> None:
    assert result(running, "reactor_reload") is True
    running.service.errors["reload"] = ReactorError("disks.yaml:3: no such key")
    assert error(running, "reactor_reload")["message"] == "disks.yaml:3: no such key"

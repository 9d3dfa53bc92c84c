"""deploy/disks.schema.json refuses what the reader refuses for its form, and nothing else."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import event, given
from hypothesis import strategies as st

from backends import registry
from reactor.config import load
from reactor.errors import ConfigError

ROOT = Path(__file__).parents[2]
SCHEMA = jsonschema.Draft7Validator(json.loads((ROOT / "deploy/disks.schema.json").read_text()))
README_BLOCKS = re.findall(
    r"^```yaml\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
)

SIZES = st.integers(1, 1 << 20).flatmap(
    lambda blocks: st.sampled_from([blocks * 4096, f"{blocks * 4}KiB", f"{blocks}M", str(4096)])
)
SECONDS = st.integers(0, 1000).flatmap(lambda n: st.sampled_from([n, f"{n}s", f"{n * 1000}ms"]))
BOOLEANS = st.sampled_from([True, False, "true", "false"])
ADDRESSES = st.sampled_from(["unix:/a", "tcp:127.0.0.1:1", "tcp:[::1]:65535", "systemd:a"])
OWN = {
    "malloc": {"size": SIZES},
    "null": {"size": SIZES},
    "file": {"path": st.sampled_from(["a.img", "/dev/x"]), "size": SIZES, "direct": BOOLEANS},
}
REQUIRED = {"malloc": "size", "file": "path"}
COMMON = {
    "device": st.just("auto"),
    "listen": ADDRESSES | st.lists(ADDRESSES, unique=True),
    "core": st.just(0),
    "readonly": BOOLEANS,
    "block_size": st.sampled_from([512, 4096, "1KiB", "4k"]),
    "connections": st.integers(1, 16),
    "timeout": SECONDS,
    "dead_timeout": SECONDS,
    "attach": st.sampled_from(["auto", "netlink", "ioctl"]),
}
#: Wrong for any key, and for some.
WRONG = [
    True,
    {},
    [[]],
    [{}],
    "",
    0.5,
    -1,
    "-1",
    "a b",
    "http:a",
    "/dev/sda",
    "1KB",
    "tcp:a:b",
    70000,
]
NEVER_WRONG_ENOUGH = {
    "path": [0.5, -1, 70000, "-1", "a b", "http:a", "/dev/sda", "1KB", "tcp:a:b"],
    # Numbers that are quoted, or too large for what else is there.
    "core": [70000],
    "size": [0.5, 70000],
    "timeout": [70000],
    "dead_timeout": [70000],
    "readonly": [True],
    "direct": [True],
}


@st.composite
def configs(draw: Any) -> dict[str, Any]:
    """A config that the reader takes."""
    kinds = st.fixed_dictionaries
    defaults = draw(kinds({}, optional={**COMMON, "size": SIZES, "path": OWN["file"]["path"]}))
    chosen = draw(st.sampled_from([None, *OWN]))
    if chosen:
        defaults["backend"] = chosen
    disks: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(["a", "B-1", "_.x"]), unique=True)):
        backend = draw(st.sampled_from([*OWN]))
        disk = {"backend": backend}
        if chosen and draw(st.booleans()):
            backend, disk = chosen, {}
        own = dict(OWN[backend])
        required = REQUIRED.get(backend)
        if required and required not in defaults:
            disk[required] = draw(own.pop(required))
        disks[name] = {**disk, **draw(kinds({}, optional={**COMMON, **own}))} or None
    files = [n for n in disks if {**defaults, **(disks[n] or {})}.get("backend") == "file"]
    for name in files[1:]:  # an image has one writer
        disks[name] = {**(disks[name] or {}), "path": f"{name}.raw"}
    return {key: value or None for key, value in (("defaults", defaults), ("disks", disks))}


@st.composite
def broken(draw: Any) -> dict[str, Any]:
    """The same with a change, which may make it wrong."""
    config = draw(configs())
    disks = config["disks"] or {}
    where = draw(st.sampled_from(["", "defaults", *disks]))
    keys = config if not where else config["defaults"] if where == "defaults" else disks[where]
    change = draw(st.sampled_from(["drop", "add", "set", "name"]))
    event(f"{change} in {where or 'the file'}")
    if change == "name":
        config["disks"] = {
            draw(st.sampled_from([".x", "a b", "a" * 129, "x" * 128])): None,
            **disks,
        }
    elif change == "add" and keys is not None:
        keys[draw(st.sampled_from(["sise", "disk", "Backend"]))] = 1
        keys[draw(st.sampled_from(["direct", "sizes"]))] = True
    elif change == "drop" and keys:
        del keys[draw(st.sampled_from(sorted(keys)))]
    elif change == "set" and keys:
        # A backend's key in defaults is read only with a disk that takes it.
        allowed = sorted(key for key in keys if where != "defaults" or key in COMMON)
        if allowed:
            key = draw(st.sampled_from(allowed))
            wrong = [w for w in WRONG if not is_in(w, NEVER_WRONG_ENOUGH.get(key, []))]
            keys[key] = draw(st.sampled_from(wrong))
    return config


def is_in(value: object, values: list[Any]) -> bool:
    return any(
        value is other or (type(value) is type(other) and value == other) for other in values
    )


def reader_takes(text: str) -> str:
    """Return "" or what it says."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        try:
            load(Path(file.name), registry.schemas(), (0,))
        except ConfigError as error:
            return str(error)
    return ""


def schema_takes(text: str) -> str:
    return "\n".join(error.message for error in SCHEMA.iter_errors(yaml.safe_load(text)))


def test_the_schema_is_one() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA.schema)


@given(configs())
def test_what_the_reader_takes_the_schema_takes(config: dict[str, Any]) -> None:
    text = yaml.safe_dump(config)
    assert reader_takes(text) == ""
    assert schema_takes(text) == ""


@given(broken())
def test_what_the_reader_refuses_the_schema_refuses(config: dict[str, Any]) -> None:
    text = yaml.safe_dump(config)
    reader, schema = reader_takes(text), schema_takes(text)
    # What disks may not have together no schema can say.
    reader = "\n".join(line for line in reader.splitlines() if "is also the path" not in line)
    event("refused" if reader else "taken")
    assert bool(reader) == bool(schema), f"{text}\nreader: {reader}\nschema: {schema}"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_the_schema_takes_the_examples(path: Path) -> None:
    assert schema_takes(path.read_text()) == ""


@pytest.mark.parametrize("block", README_BLOCKS)
def test_the_schema_takes_what_the_readme_shows(block: str) -> None:
    assert schema_takes(block) == ""


@pytest.mark.parametrize("word", ["null", "'null'", "malloc"])
def test_null_is_a_backend_with_and_without_quotes(word: str) -> None:
    text = f"disks: {{a: {{backend: {word}, size: 1M}}}}"
    assert (reader_takes(text), schema_takes(text)) == ("", "")


@pytest.mark.parametrize(
    "text",
    [
        "disks: {a: {size: 1M}}",
        "disks: {a: }",
        "disks: {a: {backend: malloc}}",
        "{defaults: {backend: malloc}, disks: {a: }}",
        "{defaults: {backend: malloc, size: 1M}, disks: {a: {path: b}}}",
        "{defaults: {size: 1M}, disks: {a: {backend: file}}}",
        "disks: {a: {backend: malloc, size: 1M, direct: true}}",
        "disks: {a: {backend: mallok, size: 1M}}",
        "disks: [a]",
        "[]",
        "disk: {}",
    ],
)
def test_both_refuse_what_a_disk_lacks_or_has_too_much(text: str) -> None:
    assert reader_takes(text)
    assert schema_takes(text)

"""YAML text to keys and values that know their lines, and back. Only here is YAML known.

Nothing is constructed: the values stay text until their key says what they mean. Aliases are not
expanded either, so that no file means more than it holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Final, TypeAlias

import yaml
from yaml.composer import ComposerError

from reactor.config.problems import Problems
from reactor.errors import UsageError, quoted, reason
from reactor.spec import DiskSpec
from reactor.units import format_exact_size, format_size

FILE_MAX: Final = 1 << 20  # bytes
NODES_MAX: Final = 65_536  # about 1 KiB of memory each
NESTING_MAX: Final = 16

#: What a key is set to. Numbers and words are text; a collection within a list, or a mapping, is
#: never right and stands as an empty one.
Value: TypeAlias = "str | bool | list[Value] | dict[str, Value] | None"

_TAG: Final = "tag:yaml.org,2002:"
_TAGS: Final = {
    _TAG + name
    for name in ("str", "int", "float", "bool", "null", "timestamp", "value", "seq", "map")
}
_NULL: Final = _TAG + "null"
_TRUE: Final = ("true", "yes", "on")


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value, and where it stands. `place` is like `disks.vm1.size`."""

    place: str
    line: int
    value: Value = None
    node: yaml.Node | None = None


class _Loader(yaml.SafeLoader):
    """Composes within bounds and without tags of other languages."""

    depth = 0
    nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > NESTING_MAX:
            self._refuse(f"nested more than {NESTING_MAX} levels deep", self.get_mark())
        if self.nodes > NODES_MAX:
            self._refuse(f"more than {NODES_MAX} keys and values", self.get_mark())
        node = super().compose_node(parent, index)
        self.depth -= 1
        if node is not None and node.tag not in _TAGS:
            if node.tag == _TAG + "merge":
                self._refuse("merge keys (<<) are not supported; use defaults", node.start_mark)
            tag = node.tag.replace(_TAG, "!!")
            self._refuse(f"the tag {quoted(tag)} is not allowed", node.start_mark)
        return node

    def _refuse(self, problem: str, mark: Any) -> None:
        raise ComposerError(None, None, problem, mark)


def read(path: Path, problems: Problems) -> Entry:
    """Return the file's root; raises UsageError when unreadable, ConfigError when not YAML."""
    text = _text(path, problems)
    root = None
    try:
        root = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.add(mark.line + 1 if mark else 1, "", _syntax_problem(error))
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.add(line, "", f"the character U+{error.character:04X} is not allowed")
    if problems:
        raise problems.error()
    return _entry("", 1, root) if root is not None else Entry("", 1)


def entries(parent: Entry, problems: Problems, *, kind: str) -> dict[str, Entry]:
    """Return the keys of a mapping; nothing is an empty one. `kind` says what belongs there."""
    if parent.node is None or parent.node.tag == _NULL:
        return {}
    if not isinstance(parent.node, yaml.MappingNode):
        problems.add(parent.line, parent.place, f"expected {kind}, found {describe(parent.value)}")
        return {}
    found: dict[str, Entry] = {}
    for key, node in parent.node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            problems.add(line, parent.place, "a key must be a word")
            continue
        place = place_of(parent, key.value)
        if key.value in found:
            problems.add(line, place, f"given twice; first on line {found[key.value].line}")
            continue
        found[key.value] = _entry(place, line, node)
    return found


def place_of(parent: Entry, key: str) -> str:
    """Return the place of a key, fit for one line."""
    word = key if key.isprintable() and len(key) <= 128 else quoted(key)
    return f"{parent.place}.{word}" if parent.place else word


def describe(value: Value) -> str:
    """Return what `value` is, for a message that expected something else."""
    if isinstance(value, str) and value:
        return quoted(value)
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, list):
        return "a list"
    return "a mapping" if isinstance(value, dict) else "nothing"


def dump(specs: Iterable[DiskSpec]) -> str:
    """Return the disks.yaml that makes `specs` again."""
    disks = {spec.name: _plain(spec) for spec in specs}
    # Escaped beyond ASCII: some characters there end a line in YAML.
    return yaml.safe_dump({"disks": disks}, sort_keys=False, width=10_000)


def _text(path: Path, problems: Problems) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(FILE_MAX + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        what = reason(error).removeprefix(f"{path}: ")
        raise UsageError(f"config {path} cannot be read: {what}") from error
    if len(data) > FILE_MAX:
        raise UsageError(f"config {path} is larger than {format_size(FILE_MAX)}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.add(line, "", f"the byte 0x{data[error.start]:02x} is not UTF-8 text")
        raise problems.error() from None


def _syntax_problem(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or "not understood"
    if "'\\t'" in problem:
        return "a tab cannot indent YAML; use spaces"
    if "another document" in problem:
        return "a second YAML document begins; only one is read"
    if isinstance(error, ComposerError) and error.context is None:
        return problem
    return f"not YAML: {problem}" + (f" {error.context}" if error.context else "")


def _entry(place: str, line: int, node: yaml.Node) -> Entry:
    return Entry(place, line, _value(node), node)


def _value(node: yaml.Node, *, nested: bool = False) -> Value:
    if isinstance(node, yaml.MappingNode):
        return {}
    if isinstance(node, yaml.SequenceNode):
        return [] if nested else [_value(item, nested=True) for item in node.value]
    text: str = node.value
    if node.tag == _NULL and text in ("", "~"):  # `backend: null` names a backend
        return None
    if node.tag == _TAG + "bool":
        return text.lower() in _TRUE
    return text


def _plain(spec: DiskSpec) -> dict[str, Any]:
    plain: dict[str, Any] = {"backend": spec.backend}
    plain |= {key: _readable(key, value) for key, value in sorted(spec.options.items())}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if field.default is MISSING or value == field.default or field.name == "uuid":
            continue
        plain[field.name] = [str(address) for address in value] if field.name == "listen" else value
    return plain


def _readable(key: str, value: Any) -> Any:
    if key == "size" and isinstance(value, int) and value % 1024 == 0:
        return format_exact_size(value)
    return value  # a few bytes stay a number: YAML quotes text that looks like one

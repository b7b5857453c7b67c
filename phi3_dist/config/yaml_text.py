"""YAML of unknown origin, read in bounded time: its size, its depth and the number of its values before anything else.

PyYAML composes by recursion and shares what aliases name, so that a few hundred bytes can stand for billions of values.
Here each value is counted, also each time that an alias repeats it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from phi3_dist.errors import Problem

__all__ = ["LARGEST_BYTES", "Document", "YamlFault", "read_yaml", "read_yaml_file"]

LARGEST_BYTES = 512 * 1024
DEEPEST = 20
"""Sections and lists inside one another."""
MOST_VALUES = 20_000
LONGEST_NUMBER = 300
"""Characters. Beyond 4,300 digits Python itself refuses to print a number."""
LONGEST_KEY = 200
_TOLD_AT_MOST = 50
_SHOWN_AT_MOST = 60
_KEYED, _LISTED = "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"
_TEXT = "tag:yaml.org,2002:str"
_MERGE = "tag:yaml.org,2002:merge"


class YamlFault(ValueError):  # noqa: N818  a user's fault: callers make a Problem of it
    """Why a text is not YAML that can be read: `what`, and the line (from 1), where it is known."""

    def __init__(self, what: str, line: int | None = None) -> None:
        self.what, self.line = what, line
        super().__init__(what)


@dataclass
class Document:
    """The values, where each key stands (dotted path → place), and what is wrong with single places."""

    values: Any = None
    places: dict[str, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    """The first of them."""
    untold: int = 0
    """How many more there are."""


def read_yaml(
    text: str, *, place: Callable[[int], str], path: str = "", name: str = "", merge: bool = False
) -> Document:
    """Read one YAML document.

    `place` makes words of a line; `path` is where in the run file the value belongs; `name` is the whole's.
    With `merge` the merge key `<<` is read, else it is a key like any other. Raises `YamlFault`.
    """
    if len(text) > LARGEST_BYTES:
        raise YamlFault(f"is larger than {LARGEST_BYTES // 1024} KiB, too large for such a file")
    document = Document()
    reader: _Reader | None = None
    try:
        reader = _Reader(text, document, place, name, merge)
        node = reader.get_single_node()
        document.values = None if node is None else reader.value(node, path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise YamlFault(f"is not YAML: {what}", mark.line + 1 if mark else None) from None
    finally:
        if reader is not None:
            reader.dispose()
    return document


def read_yaml_file(path: Path) -> Any:
    """The values of a YAML file in which line numbers don't matter. Raises OSError, and YamlFault for what it holds."""
    with path.open("rb") as file:
        raw = file.read(LARGEST_BYTES + 1)
    try:
        return read_yaml(raw.decode("utf-8-sig"), place=lambda line: f"{path.name}:{line}", merge=True).values
    except UnicodeDecodeError as error:
        raise YamlFault(f"is not UTF-8 text: {error.reason} at byte {error.start}") from None


class _Reader(yaml.SafeLoader):
    """PyYAML's safe loader, walked node by node for lines, sums, and duplicate keys, which it drops in silence."""

    def __init__(self, text: str, document: Document, place: Callable[[int], str], name: str, merge: bool) -> None:
        super().__init__(text)
        self.document, self.place, self.name, self.merge = document, place, name, merge
        self.above: list[yaml.Node] = []
        self.depth = self.composed = self.values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.composed += 1
        self.depth += 1
        if self.depth > DEEPEST or self.composed > 2 * MOST_VALUES:  # keys are nodes too
            what = f"nests more than {DEEPEST} levels" if self.depth > DEEPEST else f"holds over {MOST_VALUES:,} values"
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            raise YamlFault(what, event.start_mark.line + 1)
        try:
            node: yaml.Node | None = super().compose_node(parent, index)
            return node
        finally:
            self.depth -= 1

    def value(self, node: yaml.Node, path: str) -> Any:
        self.values += 1
        if self.values > MOST_VALUES or len(self.above) > DEEPEST:  # by way of aliases
            raise YamlFault(f"expands to over {MOST_VALUES:,} values or {DEEPEST} levels, by aliases", _line(node))
        if any(node is other for other in self.above):
            self.add_problem(self.where(path, node), "an alias that contains itself")
            return None
        self.above.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return self.scalar(node)
            if node.tag not in (_KEYED, _LISTED):
                self.add_problem(self.where(path, node), f"the tag {_short_tag(node.tag)} is not read", "leave it out")
                return None
            if isinstance(node, yaml.MappingNode):
                return self.mapping(node, path)
            return [self.value(item, f"{path}[{index}]") for index, item in enumerate(node.value)]
        finally:
            self.above.pop()

    def scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag != _TEXT and len(node.value) > LONGEST_NUMBER:
            raise YamlFault(f"is not YAML: a number or date of {len(node.value):,} characters", _line(node))
        try:
            return self.construct_object(node)
        except (ValueError, LookupError, AttributeError, TypeError, OverflowError):
            # the safe loader looks into what a tag or its own pattern promises: `!!bool maybe`, `!!int ''`, 2024-13-45
            kind = _short_tag(node.tag)[2:]
            what = f"is not YAML: {_shortened(repr(node.value))} is not {'an' if kind == 'int' else 'a'} {kind}"
            raise YamlFault(what, _line(node)) from None

    def mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if self.merge and key_node.tag == _MERGE:
                inner = self.value(value_node, path)
                for one in inner if isinstance(inner, list) else [inner]:
                    merged = {**one, **merged} if isinstance(one, dict) else merged
                continue
            line = self.place(_line(key_node))
            if not isinstance(key_node, yaml.ScalarNode):
                self.add_problem(f"{path or self.name} ({line})", "a key must be plain text")
                continue
            key = key_node.value
            if len(key) > LONGEST_KEY:
                raise YamlFault(f"has a key of {len(key):,} characters", _line(key_node))
            full = f"{path}.{key}" if path else key
            if key in out:
                first = self.document.places[full]
                self.add_problem(f"{full} ({line})", f"the key appears twice, first at {first}", "keep one of them")
            self.document.places[full] = line
            out[key] = self.value(value_node, full)
        return {**merged, **out} if merged else out

    def where(self, path: str, node: yaml.Node) -> str:
        place = self.document.places.get(path) or self.place(_line(node))
        return f"{path} ({place})" if path else place

    def add_problem(self, where: str, what: str, fix: str = "") -> None:
        if len(self.document.problems) < _TOLD_AT_MOST:
            self.document.problems.append(Problem(where, what, fix))
        else:
            self.document.untold += 1


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _short_tag(tag: str) -> str:
    """`!!bool` for YAML's own `tag:yaml.org,2002:bool`."""
    return _shortened(f"!!{tag.removeprefix('tag:yaml.org,2002:')}")


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_AT_MOST else f"{text[: _SHOWN_AT_MOST - 3]}..."

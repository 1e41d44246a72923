"""The schema of inspections, and reading them: only what this version writes is accepted.

``schema.json`` beside this file is the schema (JSON Schema, draft 2020-12), which describes every
field.  `check` knows the part of the language that it uses.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from typing import Any

from graphopt.errors import FileFormatError

FORMAT = "graphopt.inspection"
SCHEMA_VERSION = 2
_TYPES: Mapping[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


@functools.cache
def schema() -> dict[str, Any]:
    """The schema as data."""
    text = resources.files("graphopt.inspect").joinpath("schema.json").read_text("utf-8")
    return json.loads(text)


def read(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Read an inspection from a file, and check it.

    Raises:
        FileFormatError: It can't be read, is no inspection, or one of another version.
    """
    try:
        with open(source, encoding="utf-8") as file:
            data = json.load(file)
    except (OSError, ValueError) as error:
        raise FileFormatError(f"{os.fspath(source)} can't be read: {error}") from None
    check(data)
    return data


def check(data: Any) -> None:
    """Refuse what is no inspection of this version.

    Raises:
        FileFormatError: Says where it differs from the schema.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileFormatError(
            "this is no inspection",
            hint="`graphopt dump MODEL --format json` and graphopt.inspect.inspection make one",
        )
    version = data.get("schema_version")
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise FileFormatError(
            f"this inspection has schema version {version!r}; {SCHEMA_VERSION} is read here",
            hint="make it anew with this version of graphopt",
        )
    for problem in _problems(data, schema(), "the inspection"):
        raise FileFormatError(problem)
    for problem in _dangling(data):
        raise FileFormatError(problem)


def _problems(value: Any, rule: Mapping[str, Any], where: str) -> Iterator[str]:
    if "$ref" in rule:
        rule = schema()["$defs"][rule["$ref"].rpartition("/")[2]]
    if "const" in rule and value != rule["const"]:
        yield f"{where} is {value!r}, not {rule['const']!r}"
    if "enum" in rule and value not in rule["enum"]:
        yield f"{where} is {value!r}, not one of {', '.join(map(repr, rule['enum']))}"
    kinds = rule.get("type", ())
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_is(value, kind) for kind in kinds):
        yield f"{where} is of type {type(value).__name__}, not {' or '.join(kinds)}"
        return
    if "minimum" in rule and value < rule["minimum"]:
        yield f"{where} is {value}, below {rule['minimum']}"
    if isinstance(value, dict):
        yield from _of_object(value, rule, where)
    if isinstance(value, list) and "items" in rule:
        for position, item in enumerate(value):
            yield from _problems(item, rule["items"], f"{where}[{position}]")


def _of_object(value: Mapping[str, Any], rule: Mapping[str, Any], where: str) -> Iterator[str]:
    for key in rule.get("required", ()):
        if key not in value:
            yield f"{where} lacks {key!r}"
    known = rule.get("properties", {})
    for key, item in value.items():
        inner = known.get(key, rule.get("additionalProperties"))
        if inner is not None:
            yield from _problems(item, inner, f"{where}.{key}")


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    return isinstance(value, _TYPES[kind])


def _dangling(data: Mapping[str, Any]) -> Iterator[str]:
    """References to nodes, sources and timelines that aren't there."""
    names = [node["name"] for node in data["nodes"]]
    yield from _dangling_nodes(data["nodes"], set(names), len(data["sources"]))
    for snapshot in data["snapshots"]:
        yield from _dangling_snapshot(snapshot, len(names), len(data["timelines"]))
    for line in data["timelines"]:
        spans = line["spans"]
        if any(len(span) != 5 or not 0 <= span[4] < len(line["categories"]) for span in spans):
            yield f"timeline {line['title']!r} has a malformed span"
        elif any(not 0 <= n < len(names) for n in (*line["steps"], *(s[0] for s in spans))):
            yield f"timeline {line['title']!r} has nodes that aren't there"
    if not data["snapshots"]:
        yield "there is no snapshot"


def _dangling_nodes(
    nodes: Sequence[Mapping[str, Any]], known: set[str], sources: int
) -> Iterator[str]:
    if len(known) != len(nodes):
        yield "two nodes have the same name"
    for node in nodes:
        for name in node["inputs"]:
            if name not in known:
                yield f"node {node['name']!r} reads {name!r}, which isn't there"
        if node.get("source", -1) >= sources:
            yield f"node {node['name']!r} has a source line that isn't there"


def _dangling_snapshot(snapshot: Mapping[str, Any], nodes: int, timelines: int) -> Iterator[str]:
    again = map(_number, snapshot.get("again", ()))
    numbers = [*snapshot["added"], *snapshot["removed"], *map(_number, snapshot["changed"]), *again]
    if any(not 0 <= number < nodes for number in numbers):
        yield f"snapshot {snapshot['label']!r} has nodes that aren't there"
    if snapshot["timeline"] >= timelines:
        yield f"snapshot {snapshot['label']!r} has a timeline that isn't there"


def _number(text: str) -> int:
    return int(text) if text.isdigit() else -1

"""Drawings: Graphviz DOT, and SVG by the ``dot`` program."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.inspect.document import Document
from graphopt.inspect.nodes import NodeView, node_views
from graphopt.inspect.text import one_line
from graphopt.plain import human_bytes

_COLOURS = {"forward": "#e8f0fe", "backward": "#fdeee3", "recomputed": "#fff3b0"}
_SAVED = "#cfe8cf"
_DOT_SECONDS = 300


def dot_text(document: Document) -> str:
    """The document as Graphviz DOT: modules as clusters, parameters folded into their readers."""
    nodes = node_views(document)
    lines = ["digraph graphopt {", "  rankdir=TB;", f"  label={_quote(_title(document))};"]
    # Nested clusters can hold Graphviz's network simplex up for minutes otherwise.
    lines += ["  nslimit=2; nslimit1=2;"]
    lines += ['  node [shape=box, style="rounded,filled", fontname="Helvetica", fontsize=10];']
    lines += ['  edge [color="#666666", arrowsize=0.6];']
    identity = {node.name: f"n{index}" for index, node in enumerate(nodes)}
    lines += _clusters(nodes, identity)
    for node in nodes:
        for source in node.inputs:
            lines.append(f"  {identity[source]} -> {identity[node.name]};")
    return "\n".join([*lines, "}", ""])


def svg_text(document: Document) -> str:
    """The document as SVG, drawn by Graphviz.

    Raises:
        UnsupportedError: Graphviz isn't installed.
        GraphoptError: It fails, or takes too long.
    """
    program = shutil.which("dot")
    if program is None:
        raise UnsupportedError(
            "SVG needs the program 'dot' of Graphviz, which isn't installed",
            hint="install it (Debian: apt-get install graphviz), or dump as dot and draw elsewhere",
        )
    try:
        done = subprocess.run(
            [program, "-Tsvg"],
            input=dot_text(document).encode(),
            capture_output=True,
            timeout=_DOT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise GraphoptError(
            f"dot didn't finish drawing within {_DOT_SECONDS} s",
            hint="the graph is too large to draw; dump it as py or json",
        ) from None
    if done.returncode != 0:
        raise GraphoptError(f"dot failed: {one_line(done.stderr.decode(errors='replace'))[:300]}")
    return done.stdout.decode()


def _title(document: Document) -> str:
    return f"{document.title}: {document.view}"


def _clusters(nodes: list[NodeView], identity: dict[str, str]) -> list[str]:
    """Nested clusters by phase and module path."""
    tree: dict[str, Any] = {}
    for node in nodes:
        place = tree
        path = [node.phase, *node.scope.split(".")] if node.scope else [node.phase]
        for part in path if node.op == "call" else []:
            place = place.setdefault(part, {})
        place.setdefault("", []).append(node)
    lines: list[str] = []
    _cluster(tree, "  ", lines, identity, [0])
    return lines


def _cluster(
    tree: dict[str, Any], pad: str, lines: list[str], identity: dict[str, str], count: list[int]
) -> None:
    lines += [f"{pad}{identity[node.name]} [{_style(node)}];" for node in tree.get("", ())]
    for part, inside in tree.items():
        if part == "":
            continue
        count[0] += 1
        lines.append(f"{pad}subgraph cluster_{count[0]} {{")
        lines.append(f'{pad}  label={_quote(part)}; color="#999999"; fontname="Helvetica";')
        _cluster(inside, pad + "  ", lines, identity, count)
        lines.append(f"{pad}}}")


def _style(node: NodeView) -> str:
    rows = [node.target or node.name, node.type]
    if node.bytes:
        rows.append(human_bytes(node.bytes))
    if node.saved:
        rows.append(f"saved {human_bytes(node.saved)}")
    rows += node.state
    label = "\\n".join(_escape(row) for row in rows if row)
    colour = _SAVED if node.saved else _COLOURS.get(node.phase, "#ffffff")
    if node.op != "call":
        colour = "#ffffff"
    return f'label="{label}", tooltip={_quote(node.name)}, fillcolor="{colour}"'


def _quote(text: str) -> str:
    return f'"{_escape(text)}"'


def _escape(text: str) -> str:
    # Backslashes start escapes in DOT labels (\N, \G, \l ...); one_line leaves nothing unprintable.
    return one_line(text).replace("\\", "\\\\").replace('"', '\\"')

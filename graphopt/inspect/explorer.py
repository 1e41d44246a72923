"""The JSON files of Google's Model Explorer: a graph, and data by node that colours it.

Both follow version 0.1 of its formats (`graph_builder.GraphCollection` and
`node_data_builder.ModelNodeData` of the package ``ai-edge-model-explorer``); the package isn't
needed.  Open them with

    model-explorer graph.json --node_data_paths bytes.json,phase.json
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from graphopt.errors import UnsupportedError, suggest
from graphopt.inspect.document import Document
from graphopt.inspect.nodes import NodeView, node_views
from graphopt.inspect.text import one_line

Value = float | str

_RAMP = ("#f7fbff", "#08519c")  # sequential: light to dark blue
_CATEGORIES = (  # Okabe and Ito's colours, which the colour-blind tell apart
    "#e69f00",
    "#56b4e9",
    "#009e73",
    "#f0e442",
    "#0072b2",
    "#d55e00",
    "#cc79a7",
    "#999999",
)
_FACTS = ("bytes", "flops", "saved", "phase", "type", "scope")


def explorer_form(document: Document) -> dict[str, Any]:
    """The document as a graph collection: scopes as namespaces, tensors on the edges."""
    views = node_views(document)
    identity = graph_id(document)
    nodes = [_node(view) for view in views]
    graph: dict[str, Any] = {"id": identity, "nodes": nodes}
    graph["groupNodeAttributes"] = {"": _attributes_of(document), **_modules(views)}
    return {"label": one_line(document.title) or "graphopt", "graphs": [graph]}


def explorer_data(
    document: Document, overlay: str = "bytes", facts: Mapping[str, Mapping[str, Value]] = {}
) -> dict[str, Any]:
    """Data by node for Model Explorer: one overlay of a document's graph.

    Args:
        document: The document whose `explorer_form` it is for.
        overlay: ``bytes``, ``flops``, ``saved`` (numbers, coloured from light to dark), ``phase``,
            ``type``, ``scope`` (categories), or one of ``facts``.
        facts: Further overlays: name -> node name -> number or text.

    Raises:
        UnsupportedError: There is no such overlay.
    """
    if overlay not in _FACTS and overlay not in facts:
        known = [*_FACTS, *facts]
        hint = suggest(overlay, known) or f"one of {', '.join(known)}"
        raise UnsupportedError(f"no overlay {overlay!r}", hint=hint)
    views = node_views(document)
    if overlay in facts:
        values = {v.name: facts[overlay][v.name] for v in views if v.name in facts[overlay]}
    else:
        values = {v.name: getattr(v, overlay) for v in views if v.op == "call"}
    present = {name: value for name, value in values.items() if value not in (None, "")}
    return {graph_id(document): _node_data(overlay, present)}


def graph_id(document: Document) -> str:
    """What the graph of a document is called."""
    return one_line(f"{document.title}: {document.view}")


def _node(view: NodeView) -> dict[str, Any]:
    attributes = {
        "type": view.type,
        "bytes": view.bytes,
        "flops": view.flops,
        "saved for backward": view.saved,
        "saved for": ", ".join(view.saved_for),
        "parameters": ", ".join(view.state),
        "module": view.module,
        "source": view.source or "",
        **{f"argument {key}": value for key, value in view.literals.items()},
    }
    edges = [
        {"sourceNodeId": source, "sourceNodeOutputId": "0", "targetNodeInputId": str(index)}
        for index, source in enumerate(view.inputs)
    ]
    shape = [{"key": "tensor_shape", "value": one_line(view.type)}] if view.type else []
    return {
        "id": view.name,
        "label": one_line(view.target or view.name),
        "namespace": _namespace(view),
        "subgraphIds": [],
        "attrs": [{"key": one_line(k), "value": one_line(v)} for k, v in attributes.items() if v],
        "incomingEdges": edges,
        "outputsMetadata": [{"id": "0", "attrs": shape}],
        "inputsMetadata": [],
    }


def _namespace(view: NodeView) -> str:
    parts = [view.phase, *view.scope.split(".")] if view.op == "call" else [f"{view.op}s"]
    return "/".join(_part(part) for part in parts if part)


def _part(text: str) -> str:
    # A slash separates levels and has an escape; a semicolon separates namespaces and has none.
    return one_line(text).replace("/", "\\/").replace(";", "\N{FULLWIDTH SEMICOLON}")


def _modules(views: list[NodeView]) -> dict[str, dict[str, str]]:
    """The class of the module that a namespace stands for."""
    found: dict[str, dict[str, str]] = {}
    for view in views:
        if view.op == "call" and view.module and view.scope:
            found.setdefault(_namespace(view), {"module": one_line(view.module)})
    return found


def _attributes_of(document: Document) -> dict[str, str]:
    return {
        "view": document.view,
        "passes": one_line(", ".join(document.history)) or "none",
        "printed by": "graphopt",
    }


def _node_data(name: str, values: Mapping[str, Value]) -> dict[str, Any]:
    if all(isinstance(value, (int, float)) for value in values.values()):
        results = {node: {"value": value} for node, value in values.items()}
        stops = [{"stop": stop, "bgColor": colour} for stop, colour in enumerate(_RAMP)]
        return {"name": name, "results": results, "gradient": stops}
    kinds = list(dict.fromkeys(str(value) for value in values.values()))
    colour = {kind: _CATEGORIES[index % len(_CATEGORIES)] for index, kind in enumerate(kinds)}
    results = {
        node: {"value": one_line(value), "bgColor": colour[str(value)]}
        for node, value in values.items()
    }
    return {"name": name, "results": results, "showExpandedSummaryOnGroupNode": True}

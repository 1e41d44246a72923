"""The same thing computed, and saved, twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.ir.joint import JointView
from graphopt.ir.ops import is_repeatable
from graphopt.planning.prepare import depends_on_tangents
from graphopt.planning.rewrites import Rewrite, Site


@dataclass(frozen=True)
class Duplicates(Rewrite):
    """Forward ops with the same arguments become one: casts under autocast, copies of views.

    Before: to(x, bfloat16) -> linear_1; to(x, bfloat16) -> linear_2.  After: one cast for both.
    """

    name: ClassVar[str] = "duplicate"

    def apply(self, view: JointView) -> Sequence[Site]:
        """Merges every such op into the first of its kind."""
        late = depends_on_tangents(view)
        written = view.written
        returned = set(view.graph.output_node().all_input_nodes)
        first: dict[Any, fx.Node] = {}
        merged: Counter[str] = Counter()
        for node in list(view.graph.nodes):
            if node.op != "call_function" or node in late or not is_repeatable(node):
                continue
            if node in returned or written & set(node.all_input_nodes):
                continue
            key = _key(node)
            known = first.setdefault(key, node) if key is not None else node
            if known is node:
                continue
            node.replace_all_uses_with(known)
            view.graph.erase_node(node)
            if isinstance(known.meta.get("val"), torch.Tensor):
                merged[known.name] += 1
        return [Site((name,), self.name, count) for name, count in merged.items()]


def _key(node: fx.Node) -> Any:
    """Equal for nodes that compute the same; None: not to be compared."""
    key = (node.target, _frozen(node.args), _frozen(dict(node.kwargs)))
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(part) for part in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(part)) for name, part in sorted(value.items()))
    return (type(value), value)

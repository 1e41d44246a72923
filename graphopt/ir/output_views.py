"""Program outputs that are views of something else.

A traced graph returns copies where the model returns views: autograd's own bookkeeping of views
(shared memory, writes through one of them, gradients that meet in the base) ends at its edge. So
graphs return the bases, and the views are made from them outside, under ordinary autograd.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.storage import aliased_input

_RESHAPES = {torch.ops.aten.reshape.default}  # views wherever the strides allow it


@dataclass(frozen=True)
class OutputView:
    """One view.

    Attributes:
        base: Position of its base among the outputs of the split graph.
        module: Graph from the base, then `sized_by`, to the view.
        sized_by: Positions of the flat inputs whose sizes it reads.
    """

    base: int
    module: fx.GraphModule
    sized_by: tuple[int, ...]


@dataclass(frozen=True)
class OutputViews:
    """The views among a program's outputs.

    Attributes:
        count: Number of the program's flat outputs.
        views: Output position -> how it is made.
    """

    count: int
    views: dict[int, OutputView]

    def apply(self, flat: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[Any]:
        """The program's outputs.

        Args:
            flat: What the split graph returned.
            inputs: The flat inputs; only their sizes are read.
        """
        outputs = list(flat[: self.count])
        for position, view in self.views.items():
            outputs[position] = view.module(flat[view.base], *(inputs[i] for i in view.sized_by))
        return outputs


def split_views(forward: fx.GraphModule) -> tuple[fx.GraphModule, OutputViews]:
    """Takes the views out of a graph's outputs.

    Args:
        forward: Flat pre-dispatch graph; it is not changed.

    Returns:
        A graph over the same nodes that returns None for each view, and the bases that were not
        returned yet after all other outputs; and the views.
    """
    source = forward.graph.output_node()
    values = list(source.args[0])  # type: ignore[arg-type]
    outputs, views = list(values), {}
    for position, value in enumerate(values):
        chain = _chain(value) if isinstance(value, fx.Node) else []
        made = _module(forward, chain, value) if len(chain) > 1 else None
        if made is None:
            continue
        base = chain[0]
        if base not in outputs:
            outputs.append(base)
        outputs[position] = None
        views[position] = (base, *made)
    if not views:
        return forward, OutputViews(len(values), {})
    found = {p: OutputView(outputs.index(base), *made) for p, (base, *made) in views.items()}
    return _with_outputs(forward, outputs), OutputViews(len(values), found)


def _with_outputs(forward: fx.GraphModule, outputs: Sequence[Any]) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(forward.graph, copied)
    graph.output(tuple(copied[v] if isinstance(v, fx.Node) else v for v in outputs))
    return fx.GraphModule(forward, graph)


def _chain(value: fx.Node) -> list[fx.Node]:
    """From the base to the value; the value alone if it is no view."""
    chain = [value]
    while (base := _viewed(chain[0])) is not None:
        chain.insert(0, base)
    return chain


def _viewed(node: fx.Node) -> fx.Node | None:
    if node.op != "call_function":
        return None
    owner = node.args[0] if node.args else None
    if not isinstance(owner, fx.Node):
        return None
    if node.target is operator.getitem:  # one part of split, unbind, ...
        return owner if _viewed(owner) is not None else None
    return owner if node.target in _RESHAPES or aliased_input(node) is owner else None


def _module(
    forward: fx.GraphModule, chain: Sequence[fx.Node], value: fx.Node
) -> tuple[fx.GraphModule, tuple[int, ...]] | None:
    """The graph from base to view; None if it needs more than sizes of inputs, or copies."""
    graph = fx.Graph()
    copied = {chain[0]: graph.placeholder("base")}
    placeholders = forward.graph.find_nodes(op="placeholder")
    needed = _needed(chain)
    if needed is None:
        return None
    sized_by = [n for n in placeholders if n in needed and n is not chain[0]]
    for node in sized_by:
        copied[node] = graph.placeholder(node.name)
    for node in copied:
        copied[node].meta = dict(node.meta)
    for node in forward.graph.nodes:
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    graph.output(copied[value])
    module = fx.GraphModule(torch.nn.Module(), graph)
    if not _shares(module, [chain[0].meta["val"], *(n.meta["val"] for n in sized_by)]):
        return None
    return module, tuple(placeholders.index(n) for n in sized_by)


def _needed(chain: Sequence[fx.Node]) -> set[fx.Node] | None:
    """The chain and the arithmetic on input sizes that it reads."""
    needed, waiting = {chain[0]}, list(chain[1:])
    while waiting:
        node = waiting.pop()
        if node in needed:
            continue
        needed.add(node)
        for argument in node.all_input_nodes:
            if argument in needed or argument in chain or argument.op == "placeholder":
                needed.add(argument) if argument.op == "placeholder" else waiting.append(argument)
            elif isinstance(argument.meta.get("val"), torch.SymInt | int):
                waiting.append(argument)
            else:
                return None
    return needed


def _shares(module: fx.GraphModule, fakes: Sequence[torch.Tensor]) -> bool:
    """Whether the result has the memory of the base, tried on stand-ins."""
    mode = next((f.fake_mode for f in fakes if hasattr(f, "fake_mode")), None)
    if mode is None:
        return False
    with mode, torch.no_grad():
        result = module(*fakes)
    return result.untyped_storage()._cdata == fakes[0].untyped_storage()._cdata

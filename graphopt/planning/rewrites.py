"""Rewrites of a joint graph: other ways for the backward pass to come by what it reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt import registry
from graphopt.ir.joint import JointView
from graphopt.report import ShareRefusal


@dataclass(frozen=True)
class Site:
    """One application of a rewrite.

    Attributes:
        nodes: The node whose value autograd saves, then those that may be kept instead.
        rule: The rewrite's name.
        merged: How many equal values autograd saves besides.
    """

    nodes: tuple[str, ...]
    rule: str
    merged: int = 0


@dataclass(frozen=True)
class Rewrite:
    """A rule that changes a prepared joint graph in place; its fields are JSON-able.

    It is part of a planner's settings: each joint graph that the planner derives is rewritten
    before it is planned.

    Attributes:
        graph: Fingerprint of the one joint graph that the rule was fitted to; empty: it fits all.
    """

    name: ClassVar[str] = ""

    graph: str = ""

    def apply(self, view: JointView) -> Sequence[Site | ShareRefusal]:
        """Rewrites the graph wherever the rule fits and pays.

        Returns:
            Where it did, and where it fits and did not.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Way:
    """Rewrites that are applied together, and how far gradients are off with them.

    Attributes:
        rewrites: In the order in which they are applied.
        gradient_error: Measured ``||g - g_exact|| / ||g_exact||`` over all that is trained.
        gradient_cosine: Cosine of both.
        refused: Approximations that were tried and are no part of it.
    """

    rewrites: tuple[Rewrite, ...] = ()
    gradient_error: float = 0.0
    gradient_cosine: float = 1.0
    refused: tuple[ShareRefusal, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; of a rewrite its name and fields."""
        rules = [(rule.name, asdict(rule)) for rule in self.rewrites]
        return {**vars(self), "rewrites": rules, "refused": [asdict(r) for r in self.refused]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Way:
        """Reads what `to_dict` wrote."""
        rules = tuple(registry.rewrite(name)(**fields) for name, fields in data["rewrites"])
        refused = tuple(ShareRefusal(**each) for each in data.get("refused", ()))
        return cls(**{**data, "rewrites": rules, "refused": refused})


def insert(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Adds a call at the graph's insertion point and derives its value."""
    node = graph.call_function(target, args, kwargs)
    fakes = fx.map_arg(args, lambda n: n.meta["val"])
    tensors = [v for v in torch.utils._pytree.tree_leaves(fakes) if isinstance(v, torch.Tensor)]
    with tensors[0].fake_mode, torch.no_grad():  # type: ignore[attr-defined]
        node.meta["val"] = target(*fakes, **kwargs)
    return node


def sizes_of(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """A node's sizes as arguments: numbers, and nodes that read the free ones."""
    return _numbers(graph, torch.ops.aten.sym_size.int, node, node.meta["val"].shape)


def strides_of(graph: fx.Graph, node: fx.Node) -> list[Any]:
    """A node's strides as arguments, likewise."""
    return _numbers(graph, torch.ops.aten.sym_stride.int, node, node.meta["val"].stride())


def _numbers(graph: fx.Graph, read: Any, node: fx.Node, values: Sequence[Any]) -> list[Any]:
    return [
        insert(graph, read, node, dim) if isinstance(value, torch.SymInt) else value
        for dim, value in enumerate(values)
    ]

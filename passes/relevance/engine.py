"""One run: the forward graph, then relevance from its output back to what was asked for.

The run is ordinary tensor code.  It is traced once into a flat graph that is emitted (`tracing`),
and runs as it is where every operation is to be looked at (`audit`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.interpret import Value, call, fill, held_in, placed
from graphopt.passes.relevance.flow import Flow, merged
from graphopt.passes.relevance.ledger import Ledger
from graphopt.passes.relevance.marks import Marker
from graphopt.passes.relevance.ops import Op, is_getitem
from graphopt.passes.relevance.planning import Plan
from graphopt.passes.relevance.roles import Roles
from graphopt.passes.relevance.site import Site

OUTPUT = "output"


@dataclass
class Account:
    """What arrived at an operation and what it handed on to its operands.

    Attributes:
        arrived: Sum of the relevance at its results.
        size: Sum of its absolute values.
        left: Sum of the relevance handed on.
        least: What the size would be if each number that arrived or was handed on were the smallest
            normal one of its type; smaller ones have no relative precision.
    """

    arrived: float
    size: float
    left: float = 0.0
    least: float = 0.0


class Run:
    """One forward pass, and any number of backward ones.

    Args:
        plan: What was decided about the graph.
        tensors: Values of its ``get_attr`` nodes by target.
        inputs: Values of its placeholders.
        explicit: Hand relevance itself on instead of quotients, wherever it is defined.
        audit: Keep what arrives at and leaves each operation.

    Attributes:
        plan: As given.
        values: The value of each node.
        ledger: Where relevance ended.
        arrived: What has arrived at each value, once it is complete.
        marker: Marks the calls of a traced run.
    """

    def __init__(
        self,
        plan: Plan,
        tensors: Mapping[str, Any],
        inputs: Sequence[Tensor],
        *,
        explicit: bool = False,
        audit: bool = False,
    ) -> None:
        self.plan = plan
        needed = any(rule.needs_quotients for rule in plan.rules.values())
        self.explicit = explicit and not needed
        self.accounts: dict[Op, Account] | None = {} if audit else None
        self.values: dict[fx.Node, Any] = {}
        self.ledger = Ledger(plan.layouts, self.values)
        self.arrived: dict[fx.Node, Flow] = {}
        self._sites: dict[fx.Node, Site] = {}
        self._pending: dict[fx.Node, dict[int, Flow]] = {}
        self.marker = Marker()
        self._forward(tensors, inputs)

    @property
    def roles(self) -> Roles:
        """Roles of operands."""
        return self.plan.roles

    @property
    def followed(self) -> frozenset[fx.Node]:
        """Constants of which the relevance was asked for."""
        return self.plan.followed

    @property
    def parametric(self) -> frozenset[fx.Node]:
        """Constants that come from parameters."""
        return self.plan.parametric

    def rows(self, op: Any) -> tuple[int, ...]:
        """The dimensions of one row of a result, over which its size is taken."""
        return self.plan.rows(op)

    @torch.no_grad()
    def _forward(self, tensors: Mapping[str, Any], inputs: Sequence[Tensor]) -> None:
        plan = self.plan
        nodes = [n for n in plan.graph.nodes if n not in plan.interior or n in plan.ops]
        self.values.update(placed(plan.graph, inputs))
        fill(self.values, nodes, held_in(tensors), self._marked)
        self.marker.name(self.values)
        self.ledger.samples = self.values[self.plan.batch].shape[0] if self.plan.batch else 1

    def _marked(self, node: fx.Node, value: Value) -> Any:
        found = self._called(node, value)
        self.marker.note("forward", node.name)
        return found

    def _called(self, node: fx.Node, value: Value) -> Any:
        op = self.plan.ops.get(node)
        if op is None or is_getitem(node):
            return call(node, value)
        site = self._sites[node] = Site(self, op)
        return site.forward()

    def backward(self, seeds: Mapping[fx.Node, Tensor]) -> None:
        """Hand relevance back from the outputs.

        Args:
            seeds: Quotients at outputs: which part of each one is explained.
        """
        for node, quotient in seeds.items():
            self.ledger.book_value(OUTPUT, node, quotient * self.values[node])
            self._accumulate(node, 0, Flow(quotient))
        self.marker.note("backward", OUTPUT)
        for node in reversed(self.plan.graph.nodes):
            flows = self._pending.pop(node, None)
            if flows is not None:
                self._pass(node, flows)
                self.marker.note("backward", node.name)

    def _pass(self, node: fx.Node, flows: dict[int, Flow]) -> None:
        if self.explicit and not is_getitem(node):
            flows = {i: self._explicit(node, i, flow) for i, flow in flows.items()}
        if node in self.plan.kept:
            self.arrived[node] = flows[0]
        op = self.plan.ops.get(node)
        if op is None:
            return
        if is_getitem(node):
            source, index = node.args
            self._accumulate(source, index, flows[0])  # type: ignore[arg-type]
            return
        site = self._sites.pop(node)
        site.flows = flows
        if self.accounts is not None:
            parts = [f.exact(site.results[i]) for i, f in flows.items()]
            size = sum(float(p.abs().sum()) for p in parts)
            least = sum(f.least for f in flows.values())
            self.accounts[op] = Account(sum(float(p.sum()) for p in parts), size, least=least)
        site.rule.propagate(site)

    def _explicit(self, node: fx.Node, index: int, flow: Flow) -> Flow:
        value = self.values[node]
        value = value[index] if isinstance(value, tuple | list) else value
        return Flow(flow.relevance(value), "relevance")

    def arrive(self, node: fx.Node, flow: Flow, site: Site) -> None:
        """Take what an operation hands on to a value."""
        if self.accounts is not None and node in site.op.operands:
            account = self.accounts[site.op]
            account.left += float(flow.exact(self.values[node]).sum())
            account.least += flow.least
        self._accumulate(node, 0, flow)

    def _accumulate(self, node: fx.Node, index: int, flow: Flow) -> None:
        flows = self._pending.setdefault(node, {})
        value = self.values[node]
        value = value[index] if isinstance(value, tuple | list) else value
        flows[index] = merged(flows.get(index), flow, value)

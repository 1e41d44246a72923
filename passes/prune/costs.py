"""FLOPs and parameters of a program as polynomials in the widths of its dimensions."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import sympy
from torch import fx

from graphopt.cost.flops import flops, flops_for_shapes, graph_flops
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import region_of
from graphopt.passes.prune.dimensions import Dimensions, Monomial
from graphopt.passes.prune.rule import Value
from graphopt.solvers.widths import Cost, Term

Polynomial = dict[Monomial, float]


def flops_cost(program: Program, dimensions: Dimensions, limit: float, full: float) -> Cost:
    """FLOPs of one forward of the train-mode graph at the example sizes.

    Args:
        program: The program.
        dimensions: Its dimensions.
        limit: The most FLOPs.
        full: What the whole program has at the example sizes; it may have been traced at others.
    """
    found = FlopsCounter(dimensions).of(program.module)
    scale = full / (graph_flops(program.module.graph) or 1)
    return cost_of("flops", {monomial: scale * n for monomial, n in found.items()}, limit)


def params_cost(
    program: Program, dimensions: Dimensions, limit: float, *, in_bytes: bool = False
) -> Cost:
    """Parameters, or their bytes; tied ones count once, and those that nothing reads as well."""
    total: Polynomial = defaultdict(float)
    for parameter in program.skeleton.root.parameters():
        if id(parameter) not in dimensions.analysis.slots:
            total[()] += parameter.numel() * (parameter.element_size() if in_bytes else 1)
    for slot in dimensions.analysis.slots.values():
        if slot.is_trained:
            scale = slot.tensor.element_size() if in_bytes else 1
            for monomial, count in places(dimensions, slot.value).items():
                total[monomial] += scale * count
    return cost_of("bytes" if in_bytes else "params", total, limit)


def cost_of(name: str, polynomial: Polynomial, limit: float) -> Cost:
    """A polynomial as a cost."""
    terms = [
        Term(float(count), tuple((d, monomial.count(d)) for d in sorted(set(monomial))))
        for monomial, count in sorted(polynomial.items())
        if count
    ]
    return Cost(name, tuple(terms), limit)


def places(dimensions: Dimensions, value: Value) -> Polynomial:
    """How many elements of a tensor stay."""
    result: Polynomial = {(): 1.0}
    for labels in value.axes:
        factor = dimensions.size(labels)
        product: Polynomial = defaultdict(float)
        for a, x in result.items():
            for b, y in factor.items():
                product[tuple(sorted((*a, *b)))] += x * y
        result = product
    return result


class FlopsCounter:
    """Sums the FLOPs of a graph's nodes, those of regions included."""

    def __init__(self, dimensions: Dimensions) -> None:
        self.dimensions = dimensions
        self.values = dimensions.analysis.values
        self.symbols = [sympy.Symbol(f"k{i}", positive=True) for i in range(len(dimensions.all))]
        self.place = {symbol: i for i, symbol in enumerate(self.symbols)}

    def of(self, module: fx.GraphModule) -> Polynomial:
        """FLOPs of a graph module."""
        total: Polynomial = defaultdict(float)
        for node in module.graph.nodes:
            for monomial, count in self.of_node(module, node).items():
                total[monomial] += count
        return total

    def of_node(self, module: fx.GraphModule, node: fx.Node) -> Polynomial:
        """FLOPs of one node."""
        inner = region_of(module, node)
        if inner is not None and any(each in self.values for each in inner.graph.nodes):
            return self.of(inner)
        count = flops(node)
        if not count:
            return {}
        exact = flops_for_shapes(node, self._shape)
        return self._scaled(node, count) if exact is None else self._monomials(exact)

    def _shape(self, node: fx.Node) -> Any:
        def sizes(value: Any) -> Any:
            if isinstance(value, Value):
                return tuple(self._size(labels) for labels in value.axes)
            return type(value)(map(sizes, value)) if isinstance(value, (tuple, list)) else value

        return sizes(self.values.get(node))

    def _size(self, labels: Any) -> Any:
        polynomial = self.dimensions.size(labels)
        return sympy.Add(
            *(
                _number(count) * sympy.Mul(*(self.symbols[d] for d in monomial))
                for monomial, count in polynomial.items()
            )
        )

    def _monomials(self, expression: Any) -> Polynomial:
        result: Polynomial = {}
        for product, count in sympy.expand(expression).as_coefficients_dict().items():
            powers = product.as_powers_dict()
            monomial = [
                self.place[s] for s, power in powers.items() if s in self.place
                for _ in range(int(power))
            ]  # fmt: skip
            result[tuple(sorted(monomial))] = float(count)
        return result

    def _scaled(self, node: fx.Node, count: int) -> Polynomial:
        """For ops without a formula: in proportion to every dimension that they meet."""
        values = [self.values.get(n) for n in (node, *node.all_input_nodes)]
        axes = [labels for value in values if isinstance(value, Value) for labels in value.axes]
        inside = tuple(sorted(self.dimensions.of(axes)))
        full = math.prod(self.dimensions.all[d].width for d in inside)
        return {inside: count / full}


def _number(count: float) -> Any:
    """A whole number where it is one."""
    return sympy.Integer(round(count)) if abs(count - round(count)) < 1e-9 else sympy.Float(count)

"""A forward graph as the list of operations that rules are about.

An `Op` is one call, or a region of calls that means one operator: the seven calls of a written-out
GELU are one activation.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.errors import UnsupportedError
from graphopt.ir.interpret import Value, call
from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family, Spec
from graphopt.passes.relevance.frequencies import degree, is_complex


@dataclass(frozen=True, eq=False)
class Op:
    """One operation through which relevance may pass.

    Attributes:
        nodes: Its calls in order; the last one gives the result.
        family: What it means.
        operands: What it reads that carries relevance, without repetition.
        constants: Floating tensors that it reads and that don't carry relevance.
        spec: What is known of the (last) call.
    """

    nodes: tuple[fx.Node, ...]
    family: Family
    operands: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    spec: Spec

    @property
    def node(self) -> fx.Node:
        """The call that gives the result."""
        return self.nodes[-1]

    @property
    def name(self) -> str:
        """Name of the operator, or of the region's last one."""
        return families.op_name(self.node)

    @property
    def is_region(self) -> bool:
        """Whether several calls mean one operator."""
        return len(self.nodes) > 1

    def run(self, lookup: Value) -> Any:
        """The result, given what the operation reads."""
        inner: dict[fx.Node, Any] = {}
        for node in self.nodes:
            inner[node] = call(node, lambda n: inner[n] if n in inner else lookup(n))
        return inner[self.node]

    def cotangent(self, tensor: torch.Tensor) -> torch.Tensor:
        """What arrives, as the derivative takes it."""
        return tensor.contiguous() if self.name in families.LAID_OUT else tensor

    def argument(self, place: int | None) -> Any:
        """What stands at a place of the (last) call, or None."""
        if place is None:
            return None
        if place < len(self.node.args):
            return self.node.args[place]
        target: Any = self.node.target
        arguments = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else []
        return self.node.kwargs.get(arguments[place].name) if place < len(arguments) else None


def weight_name(op: Op) -> str:
    """The parameter that a layer's weights are, or the call's name where they are computed."""
    bias = op.argument(op.spec.bias)
    for node in op.constants:
        if node is not bias and node.op == "get_attr":
            return str(node.target)
    return op.node.name


def is_floating(value: Any) -> bool:
    """Whether a fake value is a floating tensor, or holds one."""
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, tuple | list) and any(is_floating(v) for v in value)


def is_mask(value: torch.Tensor) -> bool:
    """Whether an index says of each place whether it is taken, instead of naming places."""
    return value.dtype in (torch.bool, torch.uint8)


def values_read(node: fx.Node) -> list[fx.Node]:
    """What a call reads more of than shape and type."""
    if node.op == "call_function" and families.op_name(node) in families.SHAPED_AS:
        return [n for n in node.args[:1] if isinstance(n, fx.Node)]
    return node.all_input_nodes


def carrying(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """The floating values that depend on one of the sources through floating values."""
    found = set(sources)
    for node in graph.nodes:
        reached = any(source in found for source in values_read(node))
        value = node.meta.get("val")
        carries = node.op == "call_function" and (is_floating(value) or is_complex(value))
        if reached and carries and families.op_name(node) not in families.CREATORS:
            found.add(node)
    return found


def wanted(outputs: Iterable[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """The values among ``inside`` on which one of the outputs depends."""
    found: set[fx.Node] = set()
    stack = [node for node in outputs if node in inside]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [source for source in values_read(node) if source in inside]
    return found


def operations(
    graph: fx.Graph,
    inside: set[fx.Node],
    regions: Mapping[fx.Node, tuple[fx.Node, ...]],
    inner: Collection[fx.Node],
) -> Iterator[Op]:
    """The operations on carrying values, in the graph's order.

    Args:
        graph: The forward graph.
        inside: The carrying values.
        regions: Calls that mean one operator, by their last.
        inner: Those of them that nothing else reads.

    Raises:
        UnsupportedError: An operator without a rule; says where, and which one is close.
    """
    merged = {node for nodes in regions.values() for node in nodes[:-1]}
    lone = next((n for n in graph.nodes if n in inside - merged and _is_complex(n)), None)
    if lone is not None:
        raise UnsupportedError(
            "relevance passes through complex numbers only in homogeneous maps of real ones",
            node=lone,
            hint="write the products with real and imaginary parts",
        )
    for node in graph.nodes:
        if node.op != "call_function" or node not in inside or node in inner or _is_complex(node):
            continue
        if not any(source in inside for source in values_read(node)):
            continue  # a source
        yield operation(node, inside, regions.get(node, (node,)))


def _is_complex(node: fx.Node) -> bool:
    return is_complex(node.meta.get("val"))


def operation(node: fx.Node, inside: set[fx.Node], nodes: tuple[fx.Node, ...]) -> Op:
    """One call, or a region that ends with it."""
    spec = families.spec_of(node)
    if spec is None and len(nodes) > 1:
        spec = Spec(Family.REDUCE)
    if spec is None:
        raise unknown(node)
    if families.op_name(node) == "prod":
        spec = dataclasses.replace(spec, degree=_factors(node))
    read = dict.fromkeys(s for n in nodes for s in values_read(n) if s not in nodes)
    operands = tuple(n for n in read if n in inside)
    _refuse_shared_bias(node, spec)
    constants = tuple(n for n in read if n not in inside and is_floating(n.meta.get("val")))
    if len(nodes) > 1 and any(_is_complex(n) for n in nodes):
        spec = Spec(Family.STATISTIC, degree=float(degree(nodes, inside) or 1))
        family = Family.REDUCE if spec.degree == 1 else Family.STATISTIC
    elif len(nodes) > 1 and any(families.op_name(n) == "mean" for n in nodes):
        family = Family.REDUCE
    else:
        family = Family.ACTIVATION if len(nodes) > 1 else _family(node, spec, operands)
    return Op(nodes, family, operands, constants, spec)


def _refuse_shared_bias(node: fx.Node, spec: Spec) -> None:
    """Rules tell what is added to a product from its factors by the node.

    Raises:
        UnsupportedError: One node is both.
    """
    bias = node.args[spec.bias] if spec.bias is not None and len(node.args) > spec.bias else None
    factors = [node.args[place] for place in spec.data if place < len(node.args)]
    if isinstance(bias, fx.Node) and bias in factors:
        raise UnsupportedError(
            "one value is multiplied, and added to the product, by the same call",
            node=node,
            hint="add it by itself: x + x @ w",
        )


def _family(node: fx.Node, spec: Spec, operands: tuple[fx.Node, ...]) -> Family:
    """The family, given which operands carry: a product with a constant is linear."""
    name = families.op_name(node)
    first = node.args[0] if node.args else None
    if spec.family in (Family.LINEAR, Family.CONV):
        weight = node.args[spec.weight] if spec.weight is not None else None
        return Family.PRODUCT if weight in operands else spec.family
    if spec.family is Family.PRODUCT:
        factors = [a for a in node.args[:2] if isinstance(a, fx.Node) and a in operands]
        if len(factors) == 2:
            # the square of a value is a function of it
            same = factors[0] is factors[1] and name not in families.MATRIX
            return Family.ACTIVATION if same else Family.PRODUCT
        if name in families.MATRIX or name == "outer":
            return Family.LINEAR
        inverse = name in ("div", "divide", "true_divide") and first not in operands
        return Family.ACTIVATION if inverse else Family.SCALE
    if name in families.SCATTERED:
        return _reduced(node)
    accumulates = name in ("index_put", "_unsafe_index_put") and len(node.args) > 3 and node.args[3]
    if accumulates or node.kwargs.get("accumulate"):
        return Family.ADD
    return spec.family


def _reduced(node: fx.Node) -> Family:
    """The family of a reduction by groups.

    Raises:
        UnsupportedError: A product.
    """
    kind = node.args[4]
    if kind == "prod":
        raise UnsupportedError(
            f"no rule says how relevance passes through {families.op_name(node)!r} with 'prod'",
            node=node,
            hint="add logarithms instead of multiplying",
        )
    return Family.ADD if kind in ("sum", "mean") else Family.MAX


def _factors(node: fx.Node) -> float:
    """How many values each result of ``prod`` is the product of.

    Raises:
        UnsupportedError: It depends on the input.
    """
    shape = node.args[0].meta["val"].shape  # type: ignore[union-attr]
    over = [shape[node.args[1]]] if len(node.args) > 1 else list(shape)  # type: ignore[index]
    if not all(isinstance(size, int) for size in over):
        raise UnsupportedError("a product over the samples of a batch", node=node)
    return float(max(math.prod(over), 1))


def unknown(node: fx.Node) -> UnsupportedError:
    """The error for an operator without a rule."""
    name = families.op_name(node)
    close = families.nearest(name)
    hint = "write the model with operators that have a rule"
    if close is not None:
        hint = f"the nearest operator with a rule is {close!r} ({families.TABLE[close].family})"
    return UnsupportedError(
        f"no rule says how relevance passes through {name!r}", node=node, hint=hint
    )


def is_getitem(node: fx.Node) -> bool:
    """Whether a call takes one of several results."""
    return node.target is operator.getitem

"""Bytes of the values that a graph's nodes produce, concrete or symbolic.

Nodes carry fake tensors in ``meta["val"]``.  Where a batch or a sequence length is free, their
sizes are `torch.SymInt`; `Substitution` says which numbers stand for the symbols (default: the
hints, the sizes of the example inputs).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.ir.sharing import gives_only_aliases

Substitution = Mapping[sympy.Symbol, int]
Size = int | torch.SymInt


class UnknownSizeError(ValueError):
    """A size that depends on the data, such as the number of non-zero elements."""


def concrete(
    size: Size | torch.SymFloat | torch.SymBool, symbols: Substitution | None = None
) -> int:
    """Number behind a size.

    Args:
        size: An int or a `torch.SymInt`.
        symbols: What stands for the symbols; those missing here take their hints.

    Raises:
        UnknownSizeError: The size depends on the data and nothing was given for it.
    """
    if isinstance(size, (int, float, bool)):
        return size  # type: ignore[return-value]
    node = size.node
    if symbols:
        hints = getattr(node.shape_env, "backed_var_to_val", None)
        hints = node.shape_env.var_to_val if hints is None else hints
        given = {s: symbols.get(s, hints.get(s)) for s in node.expr.free_symbols}
        expr = node.expr.xreplace(
            {s: sympy.Integer(int(v)) for s, v in given.items() if v is not None}
        )
        if expr.is_number:
            return int(expr)
    if not node.has_hint():
        raise UnknownSizeError(f"the size {size} depends on the data")
    return int(node.hint)


def symbols_of(fakes: Sequence[torch.Tensor], shapes: Sequence[Sequence[int]]) -> Substitution:
    """What the shapes of real inputs give to the symbols of fake ones."""
    found: dict[Any, int] = {}
    for fake, shape in zip(fakes, shapes, strict=True):
        for size, actual in zip(fake.shape, shape, strict=True):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found[size.node.expr] = int(actual)
    return found


def symbolic(size: Size) -> sympy.Expr:
    """The size as a sympy expression in the program's symbols."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def same_size(first: Any, second: Any) -> bool:
    """Whether two sizes are equal whatever the input."""
    return statically_known_true(first == second)


def same_shape(first: Sequence[Any], second: Sequence[Any]) -> bool:
    """Whether two shapes are equal whatever the input."""
    pairs = zip(first, second, strict=False)
    return len(first) == len(second) and all(same_size(a, b) for a, b in pairs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in a nest of lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


def tensor_bytes(tensor: torch.Tensor) -> Size:
    """Bytes of a tensor's elements (those of its storage may be more)."""
    return tensor.numel() * tensor.element_size()


def span_bytes(tensor: torch.Tensor) -> Size:
    """Bytes from a tensor's first element to its last, as its strides lay it out."""
    if tensor.layout is not torch.strided:
        return tensor_bytes(tensor)
    last: Size = 0
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if isinstance(size, int) and size == 0:
            return 0
        last = last + (size - 1) * stride
    return (last + 1) * tensor.element_size()


def values_of(node: fx.Node) -> list[Any]:
    """A node's outputs, one entry for each element of a multi-output op."""
    value = node.meta.get("val")
    return list(value) if isinstance(value, (list, tuple)) else [value]


def is_alias(node: fx.Node) -> bool:
    """Whether all outputs of a node share their storage with its inputs, by the op's schema.

    `getitem` counts: its value was allocated by the op that it reads from.
    """
    if node.op != "call_function":
        return False
    if node.target is operator.getitem:
        return True
    return isinstance(node.target, torch._ops.OpOverload) and gives_only_aliases(node.target)


def fresh_outputs(node: fx.Node) -> list[torch.Tensor | None]:
    """The outputs that a node allocates by its schema; None where it aliases or isn't a tensor."""
    values = values_of(node)
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or is_alias(node):
        return [None] * len(values)
    aliased = [False] * len(values)
    if schema is not None and len(schema.returns) == len(values):
        aliased = [ret.alias_info is not None for ret in schema.returns]
    return [
        value if isinstance(value, torch.Tensor) and not alias else None
        for value, alias in zip(values, aliased, strict=True)
    ]


def output_bytes(node: fx.Node, symbols: Substitution | None = None) -> list[int]:
    """Bytes of each output of a node, by its fake values; 0 where it aliases an input.

    These are the sizes that the graph states.  `graphopt.cost.measure_ops` gives what the allocator
    hands out.
    """
    return [
        0 if tensor is None else concrete(span_bytes(tensor), symbols)
        for tensor in fresh_outputs(node)
    ]


def bytes_moved(node: fx.Node, symbols: Substitution | None = None) -> int:
    """Bytes that a node reads and writes: its tensor inputs and outputs once each; views none."""
    if node.op != "call_function" or _is_pure_view(node):
        return 0
    values = [*(source.meta.get("val") for source in node.all_input_nodes), node.meta.get("val")]
    return sum(concrete(tensor_bytes(tensor), symbols) for tensor in tensors_in(values))


def _is_pure_view(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return is_alias(node) and not (schema is not None and schema.is_mutable)

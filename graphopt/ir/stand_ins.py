"""Numbers that stand for the free sizes of a trace, so that another trace need have none.

What is found out by comparing a trace with one of a moved copy of the model doesn't depend on the
sizes, and a trace without free ones takes less than half the time.  The numbers are other ones
than the example's and occur nowhere in the graph, so that a size that is written into the model's
code isn't taken for one that follows the inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.graphs import arguments

StandIns = Mapping[sympy.Symbol, int]

_BEFORE = 96
"""The stand-ins are primes beyond this, which code hardly holds; inputs of such sizes are small."""


def stand_ins(module: fx.GraphModule) -> StandIns:
    """A number for each free size of a graph's inputs; nothing where one has none that would do."""
    found: dict[sympy.Symbol, int] = {}
    taken = {v for n in module.graph.nodes for _, v in arguments(n) if isinstance(v, int)}
    for size in _sizes(_fakes(module)):
        env = size.node.shape_env
        hints = getattr(env, "backed_var_to_val", None)
        hints = env.var_to_val if hints is None else hints
        for symbol in sorted(size.node.expr.free_symbols - found.keys(), key=str):
            number = sympy.nextprime(_BEFORE)
            while number in taken or number == hints[symbol]:
                number = sympy.nextprime(number)
            bounds = env.var_to_range[symbol]
            if not bounds.lower <= number <= bounds.upper:
                return {}
            found[symbol] = int(number)
            taken.add(int(number))
    return found


def resized(
    inputs: Sequence[torch.Tensor], module: fx.GraphModule, numbers: StandIns
) -> list[torch.Tensor]:
    """Inputs of a graph in the stand-ins' sizes; they hold nothing.

    Args:
        inputs: Its inputs in the example's sizes.
        module: The graph.
        numbers: Its stand-ins.
    """
    return [
        torch.empty_strided(
            [_number(s, numbers) for s in fake.shape],
            [_number(s, numbers) for s in fake.stride()],
            dtype=tensor.dtype,
            device=tensor.device,
            requires_grad=tensor.requires_grad,
        )
        for tensor, fake in zip(inputs, _fakes(module), strict=True)
    ]


def is_size(node: fx.Node) -> bool:
    """Whether a call computes with sizes."""
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)


def number_of(argument: Any, numbers: StandIns) -> int | None:
    """The number that a literal or a size among the arguments of a call is, or None."""
    if isinstance(argument, fx.Node):
        argument = argument.meta.get("val") if is_size(argument) else None
    if isinstance(argument, bool) or not isinstance(argument, int | torch.SymInt):
        return None
    return _number(argument, numbers)


def _number(size: int | torch.SymInt, numbers: StandIns) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    found = size.node.expr.xreplace({s: sympy.Integer(n) for s, n in numbers.items()})
    return int(found) if found.is_number else None


def _fakes(module: fx.GraphModule) -> list[torch.Tensor]:
    return [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]


def _sizes(fakes: Sequence[torch.Tensor]) -> Iterator[torch.SymInt]:
    for fake in fakes:
        for size in (*fake.shape, *fake.stride()):
            if isinstance(size, torch.SymInt):
                yield size

"""Numbers that stand for the free sizes of a trace, so that another trace need have none.

What is found out by comparing a trace with one of a moved copy of the model doesn't depend on the
sizes, and a trace without free ones takes less than half the time.  The numbers are other ones
than the example's, and occur neither in the graph nor in the model's code, so that a size that is
written there isn't taken for one that follows the inputs.  They fulfil the guards of the trace, so
that code that asks for sizes does what it did for the example.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from types import CodeType
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.ir.graphs import arguments
from graphopt.ir.ops import is_size

StandIns = Mapping[sympy.Symbol, int]

_BEFORE = 96
"""The stand-ins are primes beyond this, which code hardly holds; inputs of such sizes are small."""


def stand_ins(module: fx.GraphModule, model: nn.Module) -> StandIns:
    """A number for each free size of a graph's inputs; nothing where one has none that would do.

    Args:
        module: The graph.
        model: What it is a trace of.
    """
    sizes = list(_sizes(_fakes(module)))
    if not sizes:
        return {}
    env = sizes[0].node.shape_env
    hints = getattr(env, "backed_var_to_val", None)
    hints = env.var_to_val if hints is None else hints
    taken = {v for n in module.graph.nodes for _, v in arguments(n) if isinstance(v, int)}
    taken |= _written(model)
    found: dict[sympy.Symbol, int] = {}
    for symbol in sorted(set().union(*(s.node.expr.free_symbols for s in sizes)), key=str):
        number = sympy.nextprime(_BEFORE)
        while number in taken or number == hints.get(symbol):
            number = sympy.nextprime(number)
        bounds = env.var_to_range[symbol]
        if not bounds.lower <= number <= bounds.upper:
            return {}
        found[symbol] = int(number)
        taken.add(int(number))
    return found if _fulfil_guards(found, env) else {}


def _fulfil_guards(numbers: StandIns, env: Any) -> bool:
    """Whether all that the trace has asked of its sizes has the same answer for other ones."""
    conditions = (env.replace(guard.expr) for guard in env.guards)
    return all(c.xreplace(_as_sympy(numbers)) == sympy.true for c in conditions)


def _written(model: nn.Module) -> set[int]:
    """Whole numbers that a model's classes hold in their code, and its modules as attributes."""
    modules = list(model.modules())
    classes = {c for m in modules for c in type(m).__mro__ if issubclass(c, nn.Module)}
    functions = [inspect.unwrap(f) for c in classes - {nn.Module} for f in vars(c).values()]
    held = pytree.tree_leaves([vars(m) for m in modules])
    codes = [code for f in functions if (code := getattr(f, "__code__", None)) is not None]
    while codes:
        constants = pytree.tree_leaves(codes.pop().co_consts)
        codes += [c for c in constants if isinstance(c, CodeType)]
        held += constants
    return {v for v in held if isinstance(v, int)}


def resized(
    inputs: Sequence[torch.Tensor], module: fx.GraphModule, numbers: StandIns, *, meta: bool
) -> list[torch.Tensor]:
    """Inputs of a graph in the stand-ins' sizes; they hold nothing.

    Args:
        inputs: Its inputs in the example's sizes.
        module: The graph.
        numbers: Its stand-ins.
        meta: Whether they are made on the meta device, where they take no memory.
    """
    return [
        torch.empty_strided(
            [_number(s, numbers) for s in fake.shape],
            [_number(s, numbers) for s in fake.stride()],
            dtype=tensor.dtype,
            device="meta" if meta else tensor.device,
            requires_grad=tensor.requires_grad,
        )
        for tensor, fake in zip(inputs, _fakes(module), strict=True)
    ]


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
    found = size.node.expr.xreplace(_as_sympy(numbers))
    return int(found) if found.is_number else None


def _as_sympy(numbers: StandIns) -> dict[sympy.Symbol, sympy.Integer]:
    return {s: sympy.Integer(n) for s, n in numbers.items()}


def _fakes(module: fx.GraphModule) -> list[torch.Tensor]:
    return [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]


def _sizes(fakes: Sequence[torch.Tensor]) -> Iterator[torch.SymInt]:
    for fake in fakes:
        for size in (*fake.shape, *fake.stride()):
            if isinstance(size, torch.SymInt):
                yield size

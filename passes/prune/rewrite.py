"""A program without the units that are removed, and its masked twin."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import fx, nn

from graphopt.ir.graphs import lookup
from graphopt.ir.metadata import refreshed
from graphopt.ir.program import Program
from graphopt.ir.rebind import with_replaced
from graphopt.passes.prune.analysis import Analysis, Slot
from graphopt.passes.prune.rule import Edit, adaptation_of, values_in


def pruned(
    program: Program,
    analysis: Analysis,
    removed: frozenset[int],
    compensated: list[str] | None = None,
) -> Program:
    """The program without some units.

    Args:
        program: The program; it is not changed.
        analysis: Its analysis.
        removed: Units to remove.
        compensated: The names of norms and means that had to be written out are added to it.

    Returns:
        A program over smaller parameters, with the same names and the same signature.
    """
    new = with_tensors(program, analysis, lambda slot: _sliced(analysis, slot, removed))
    for before, after in graph_pairs(program, new):
        _adapt(before, after, analysis, removed, compensated)
    return refreshed(new)


def masked(program: Program, analysis: Analysis, removed: frozenset[int]) -> Program:
    """The program with all parameters of some units zero."""
    return with_tensors(program, analysis, lambda slot: _zeroed(analysis, slot, removed))


def with_tensors(
    program: Program, analysis: Analysis, change: Callable[[Slot], torch.Tensor]
) -> Program:
    """The program with other parameters, buffers and constants in place of its own."""
    return with_replaced(program, {key: change(s) for key, s in analysis.slots.items()})


def graph_pairs(old: Program, new: Program) -> list[tuple[fx.GraphModule, fx.GraphModule]]:
    """The graphs of a program beside those of a copy."""
    pairs = [(old.module, new.module)]
    if old.eval_module is not None and new.eval_module is not None:
        pairs.append((old.eval_module, new.eval_module))
    return pairs


def _sliced(analysis: Analysis, slot: Slot, removed: frozenset[int]) -> torch.Tensor:
    kept = analysis.kept(slot, removed)
    if not kept:
        return slot.tensor
    tensor = slot.tensor.detach()
    for axis, places in kept.items():
        tensor = tensor.index_select(axis, torch.tensor(places, device=tensor.device))
    return _like(slot.tensor, tensor)


def _zeroed(analysis: Analysis, slot: Slot, removed: frozenset[int]) -> torch.Tensor:
    kept = analysis.kept(slot, removed) if slot.is_trained else {}
    if not kept:
        return slot.tensor
    tensor = slot.tensor.detach().clone()
    zero_(tensor, kept)
    return _like(slot.tensor, tensor)


def zero_(tensor: torch.Tensor, kept: Mapping[int, Sequence[int]]) -> None:
    """Set all places of a tensor to zero but those that are kept, by axis."""
    for axis, places in kept.items():
        gone = np.setdiff1d(np.arange(tensor.shape[axis]), places)
        tensor.index_fill_(axis, torch.from_numpy(gone).to(tensor.device), 0)


def _like(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """A tensor of the same kind as another."""
    if isinstance(old, nn.Parameter):
        return nn.Parameter(new.contiguous(), requires_grad=old.requires_grad)
    return new.contiguous()


def _adapt(
    before: fx.GraphModule,
    after: fx.GraphModule,
    analysis: Analysis,
    removed: frozenset[int],
    compensated: list[str] | None,
) -> None:
    """Let every call of the new graph fit its smaller inputs and outputs."""
    for original, node in zip(list(before.graph.nodes), list(after.graph.nodes), strict=True):
        if node.op == "get_attr":
            inner = lookup(before, str(node.target))
            if isinstance(inner, fx.GraphModule):
                _adapt(inner, lookup(after, str(node.target)), analysis, removed, compensated)
        change = adaptation_of(node.target) if node.op == "call_function" else None
        if change is not None and _changes(original, analysis, removed):
            values = analysis.values
            change(Edit(node, original, analysis.units, values, removed, compensated))
    after.graph.lint()
    after.recompile()


def _changes(node: fx.Node, analysis: Analysis, removed: frozenset[int]) -> bool:
    """Whether any axis of a call's inputs or outputs becomes smaller."""
    return any(
        not analysis.units.kept(labels, removed).all()
        for each in (node, *node.all_input_nodes)
        for value in values_in(analysis.values.get(each))
        for labels in value.axes
    )

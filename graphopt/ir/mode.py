"""Train and eval mode of a captured graph, found by comparing traces in both modes.

An argument that differs between the trace in training mode and the one in eval mode is
*mode-bearing*: dropout's ``train`` flag, BatchNorm's ``training``, the dropout rate of an SDPA.  One
that doesn't differ is fixed, as in Monte-Carlo dropout.  Each mode-bearing node follows the
``training`` flag of the module that owns it, the innermost one in its ``nn_module_stack``, as it
does in the source: one BatchNorm can be frozen alone.

Where the traces differ in more than literals (a branch on ``self.training``), both graphs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.errors import UnsupportedError
from graphopt.ir.align import Same, align, correspondence, differences
from graphopt.ir.graphs import bind_graph, copy_graph, set_argument

if TYPE_CHECKING:
    from graphopt.ir.program import Program

# (input, p, train) -> input unchanged in eval mode; the code may then skip the call altogether
_DROPOUTS = frozenset(
    f"aten::{name}{suffix}"
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
)
WHOLE = ""  # the "argument place" of a node that runs in one mode only


@dataclass(frozen=True)
class ModeSwitch:
    """What a node's arguments are in training and in eval mode (``node.meta["mode"]``).

    Attributes:
        owner: Path of the module whose ``training`` flag decides.
        values: Argument place (``args.2``, ``kwargs.dropout_p``) -> (train value, eval value).  The
            place `WHOLE` says whether the node runs at all; its result is then unused.
    """

    owner: str
    values: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def owner_of(node: fx.Node) -> str:
    """Path of the innermost module that a node ran in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def find_switches(train: fx.GraphModule, evaluated: fx.GraphModule) -> tuple[str, ...]:
    """Mark the mode-bearing nodes of two traces with ``meta["mode"]``.

    Returns:
        Nothing where the train graph with its switches expresses both modes; else the paths of the
        modules around what differs, whose mode decides which of the graphs has to run.
    """
    alignment = align(train, evaluated)
    same = _through_dropout(correspondence(alignment))
    branching: list[fx.Node] = list(alignment.second)
    for node in alignment.first:
        values = _switch_alone(node)
        if values is None:
            branching.append(node)
        else:
            node.meta["mode"] = ModeSwitch(owner_of(node), values)
    for mine, other in alignment.pairs:
        found = differences(mine, other, same)
        if found is None:
            branching.append(mine)
        elif found:
            mine.meta["mode"] = ModeSwitch(owner_of(mine), found)
            other.meta["mode"] = ModeSwitch(owner_of(other), found)
    return _around(branching)


def _switch_alone(node: fx.Node) -> dict[str, tuple[Any, Any]] | None:
    """How a node that only the train trace has can be switched off, or None."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._schema.name
    if name in _DROPOUTS and len(node.args) == 3 and node.args[2] is True:
        return {"args.2": (True, False)}
    counts = name == "aten::add_" and not node.users
    target = node.args[0] if node.args else None
    if counts and isinstance(target, fx.Node) and target.op == "get_attr":
        return {WHOLE: (True, False)}  # BatchNorm counts its batches
    return None


def _through_dropout(same: Same) -> Same:
    """Extend ``same``: a dropout that only the train trace has stands for its input."""

    def extended(first: fx.Node, second: fx.Node) -> bool:
        while not same(first, second):
            mode = first.meta.get("mode")
            if mode is None or "args.2" not in mode.values or not first.args:
                return False
            if getattr(first.target, "_schema", None) is None:
                return False
            if first.target._schema.name not in _DROPOUTS:  # type: ignore[union-attr]
                return False
            first = first.args[0]  # type: ignore[assignment]
        return True

    return extended


def _around(nodes: list[fx.Node]) -> tuple[str, ...]:
    """Paths of all modules around some nodes; the root's is always among them."""
    if not nodes:
        return ()
    paths = {""}
    for node in nodes:
        paths.update(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    return tuple(sorted(paths))


def runs_eval(owners: tuple[str, ...], training: Callable[[str], bool]) -> bool:
    """Whether the eval graph of a program with two graphs has to run.

    Raises:
        UnsupportedError: The modules around the branch are in different modes.
    """
    flags = {owner: training(owner) for owner in owners}
    if len(set(flags.values())) == 1:
        return not flags[owners[0]]
    wrong = [owner or "the root" for owner, flag in flags.items() if not flag]
    raise UnsupportedError(
        "a model that branches on self.training, with part of it in eval mode: "
        + ", ".join(wrong),
        hint="call train() or eval() on the whole module; modules outside the branch may differ",
    )


def specialize(program: Program, training: bool | Mapping[str, bool]) -> fx.GraphModule:
    """The program's graph with all mode switches set; it shares the parameters.

    Args:
        program: The program.
        training: One mode for all modules, or a mode for each module path (missing: train).
    """
    if isinstance(training, bool):
        always = training
        flag: Callable[[str], bool] = lambda path: always  # noqa: E731
    else:
        modes = dict(training)
        flag = lambda path: modes.get(path, True)  # noqa: E731
    module = program.module
    if program.eval_module is not None and runs_eval(program.branches, flag):
        module = program.eval_module
    copied = copy_graph(module)
    _set_switches(copied, flag)
    return bind_graph(copied, program.skeleton.root)


def _set_switches(module: fx.GraphModule, training: Callable[[str], bool]) -> None:
    from graphopt.ir.align import all_graphs

    for inner in all_graphs(module):
        for node in list(inner.graph.nodes):
            mode: ModeSwitch | None = node.meta.pop("mode", None)
            if mode is None:
                continue
            chosen = 0 if training(mode.owner) else 1
            for place, values in mode.values.items():
                if place == WHOLE:
                    if not values[chosen]:
                        inner.graph.erase_node(node)
                else:
                    set_argument(node, place, values[chosen])
        inner.recompile()

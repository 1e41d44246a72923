"""Train and eval mode of a captured graph, found by comparing traces in both modes.

An argument that differs between the trace in training mode and the one in eval mode is
*mode-bearing*: dropout's ``train`` flag, BatchNorm's ``training``, the dropout rate of an SDPA.
One that doesn't differ is fixed, as in Monte-Carlo dropout.  Each mode-bearing node follows the
``training`` flag of the module that owns it, the innermost one in its ``nn_module_stack``, as it
does in the source: one BatchNorm can be frozen alone.

Where the traces differ in more than literals (a branch on ``self.training``), both graphs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx, nn

from graphopt.errors import UnsupportedError
from graphopt.ir.align import all_graphs, compare, is_dropout, name_of
from graphopt.ir.graphs import bind_graph, copy_graph, set_argument

if TYPE_CHECKING:
    from graphopt.ir.program import Program

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


M = TypeVar("M", bound=nn.Module)


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
    found = compare(train, evaluated)
    branching = [*found.branching, *switch_alone(found.alone)]
    partners = dict(found.pairs)
    for node, values in found.values.items():
        mark(node, values)
        mark(partners[node], values)
    return _around(branching)


def mark(node: fx.Node, values: Mapping[str, tuple[Any, Any]]) -> None:
    """Note that arguments of a node depend on its module's mode."""
    if values:
        node.meta["mode"] = ModeSwitch(owner_of(node), dict(values))


def switch_alone(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Mark nodes that only the train trace has; returns those that can't be switched off."""
    rest = []
    for node in nodes:
        read = node.args[0] if node.args else None
        if is_dropout(node) and node.args[2] is True:
            mark(node, {"args.2": (True, False)})
        elif (
            name_of(node) == "aten::add_"
            and not node.users
            and isinstance(read, fx.Node)
            and read.op == "get_attr"
        ):
            mark(node, {WHOLE: (True, False)})  # BatchNorm counts its batches
        else:
            rest.append(node)
    return rest


def _around(nodes: list[fx.Node]) -> tuple[str, ...]:
    """Paths of all modules around some nodes; the root's is always among them."""
    if not nodes:
        return ()
    paths = {""}
    for node in nodes:
        paths.update(path for path, _ in (node.meta.get("nn_module_stack") or {}).values())
    return tuple(sorted(paths))


def in_modes_of(module: M, source: nn.Module) -> M:
    """The module, each of its parts in the mode of the source's part of that name."""
    modes = {name: part.training for name, part in source.named_modules()}
    for name, part in module.named_modules():
        part.training = modes.get(name, source.training)
    return module


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
        "a model that branches on self.training, with part of it in eval mode: " + ", ".join(wrong),
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

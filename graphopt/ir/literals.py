"""Literals of a graph that follow ``.half()`` and ``.to()``: dtypes, devices, constants.

Which ones follow is found by tracing a copy of the model that has another dtype and lies on another
device: a literal that changed with the model is tied to a parameter or an input, one that didn't is
fixed (the float32 inside an RMSNorm).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import UnsupportedError
from graphopt.ir.align import align, all_graphs, correspondence, differences
from graphopt.ir.graphs import copy_graph, lookup, set_argument
from graphopt.ir.mode import owner_of

_FINFO = ("min", "max", "eps", "tiny", "smallest_normal", "resolution")
CONSTANT = ""  # the "argument place" of a constant that follows


@dataclass(frozen=True)
class Tie:
    """Where a literal's value comes from (``node.meta["ties"]``: argument place -> Tie).

    Attributes:
        source: Path of a parameter or buffer, or name of a placeholder.
        kind: ``dtype``, ``device``, ``device.type``, or ``finfo.min`` and its like.
        input: Whether ``source`` is a placeholder.
    """

    source: str
    kind: str
    input: bool = False

    def render(self, source: str) -> str:
        """Python for the value, given Python for the source."""
        if self.kind.startswith("finfo."):
            return f"torch.finfo({source}.dtype){self.kind.removeprefix('finfo')}"
        return f"{source}.{self.kind}"

    def value(self, tensor: torch.Tensor) -> Any:
        """The literal's value for a source tensor."""
        if self.kind == "dtype":
            return tensor.dtype
        if self.kind == "device":
            return tensor.device
        if self.kind == "device.type":
            return tensor.device.type
        return getattr(torch.finfo(tensor.dtype), self.kind.removeprefix("finfo."))


@dataclass(frozen=True)
class Literals:
    """Whether a program's literals follow the model, and why not where they don't.

    Attributes:
        dtype: Why ``.half()`` and ``.to(dtype)`` are refused, or None where they work.
        device: Why ``.to(device)`` is refused, or None where it works.
    """

    dtype: str | None = None
    device: str | None = None


@dataclass(frozen=True)
class Variant:
    """A copy of a model and its inputs in another dtype and perhaps on another device."""

    model: nn.Module
    inputs: list[torch.Tensor]
    dtype: torch.dtype
    device: str | None


def variant(
    model: nn.Module, inputs: Sequence[torch.Tensor], *, meta: bool
) -> Variant:
    """A weightless copy of a model in float64 (float32 where it has float64), on the meta device.

    Args:
        model: The model; it isn't changed.
        inputs: Its flat inputs.
        meta: Whether the copy lies on the meta device; else it is fake on its own devices.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floating = [t.dtype for t in (*tensors, *inputs) if t.is_floating_point()]
    other = torch.float32 if torch.float64 in floating else torch.float64
    memo = {id(t): _moved(t, other, meta) for t in tensors}
    return Variant(
        copy.deepcopy(model, memo),
        [_moved(t, other, meta) for t in inputs],
        other,
        "meta" if meta else None,
    )


def _moved(tensor: torch.Tensor, dtype: torch.dtype, meta: bool) -> torch.Tensor:
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=dtype, device="meta" if meta else tensor.device
    )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty.requires_grad_(tensor.requires_grad)


def tie(module: fx.GraphModule, moved: fx.GraphModule, root: nn.Module, *, meta: bool) -> Literals:
    """Tie the literals of a graph that differ from those of its moved variant.

    Sets ``meta["ties"]`` of the graph's nodes.

    Args:
        module: The graph.
        moved: The graph of its `variant`.
        root: The tree that holds the parameters.
        meta: Whether the variant lay on the meta device.

    Returns:
        What follows, and why the rest doesn't.
    """
    alignment = align(module, moved)
    same = correspondence(alignment)
    if alignment.first or alignment.second:
        return _refused(next(iter((*alignment.first, *alignment.second))))
    sources = _Sources(module, root)
    ties: list[tuple[fx.Node, dict[str, Tie]]] = []
    for mine, other in alignment.pairs:
        found = differences(mine, other, same)
        if found is None:
            return _refused(mine)
        places = {place: _classify(*values) for place, values in found.items()}
        made = {p: sources.tie(mine, kind, found[p][0]) for p, kind in places.items() if kind}
        if len(made) < len(found) or None in made.values():
            return _refused(mine)
        ties.append((mine, made))  # type: ignore[arg-type]
    for node, made in ties:
        if made:
            node.meta["ties"] = made
    fixed = None if meta else "tracing on the meta device failed, so that devices can't be tied"
    return Literals(None, fixed)


def _refused(node: fx.Node) -> Literals:
    why = f"the traced graph depends on the dtype or device at node {node.name} ({node.target})"
    return Literals(why, why)


def _classify(mine: Any, other: Any) -> str | None:
    """What kind of literal changed from ``mine`` to ``other``."""
    if isinstance(mine, torch.dtype) and isinstance(other, torch.dtype):
        return "dtype"
    if isinstance(mine, torch.device) and isinstance(other, torch.device):
        return "device"
    if isinstance(mine, str) and other == "meta":
        return "device.type"
    if isinstance(mine, float) and isinstance(other, float):
        dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        for name in _FINFO:
            values = [getattr(torch.finfo(d), name) for d in dtypes]
            if mine in values and other in values:
                return f"finfo.{name}"
    return None


class _Sources:
    """Finds the parameter or input that a literal most likely came from: the nearest one."""

    def __init__(self, module: fx.GraphModule, root: nn.Module) -> None:
        self.root = root
        self.inputs = {n.name: n.meta["val"] for n in module.graph.find_nodes(op="placeholder")}
        tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
        self.tensors = {path: tensor for path, tensor in tensors.items()}

    def tie(self, node: fx.Node, kind: str, value: Any) -> Tie | None:
        def fits(tensor: torch.Tensor) -> bool:
            floating = kind.startswith("device") or tensor.is_floating_point()
            return floating and Tie("", kind).value(tensor) == value

        prefix = owner_of(node)
        while True:
            inside = f"{prefix}." if prefix else ""
            for path, tensor in self.tensors.items():
                if path.startswith(inside) and fits(tensor):
                    return Tie(path, kind)
            if not prefix:
                break
            prefix = prefix.rpartition(".")[0]
        for name, tensor in self.inputs.items():
            if fits(tensor):
                return Tie(name, kind, input=True)
        return None


def retie(
    module: fx.GraphModule, root: nn.Module, inputs: Mapping[str, torch.Tensor]
) -> fx.GraphModule:
    """A copy of a graph whose tied literals have the values of the present parameters.

    The ties stay, so that the copy can follow again.
    """
    copied = copy_graph(module)
    for inner in all_graphs(copied):
        for node in inner.graph.nodes:
            for place, made in node.meta.get("ties", {}).items():
                if place == CONSTANT:
                    continue
                source = inputs[made.source] if made.input else lookup(root, made.source)
                set_argument(node, place, made.value(source))
        inner.recompile()
    return copied


def check_move(literals: Literals | None, tensors: Sequence[torch.Tensor], move: Any) -> None:
    """Refuse a move that the literals of a graph can't follow, before anything is moved.

    Args:
        literals: What follows.
        tensors: The module's tensors.
        move: The function that ``Module._apply`` would apply to each.

    Raises:
        UnsupportedError: Dtype or device would change, and the literals can't follow.
    """
    if literals is None or (literals.dtype is None and literals.device is None):
        return
    for dtype, device in {(t.dtype, t.device) for t in tensors}:
        moved = move(torch.empty(0, dtype=dtype, device=device))
        if moved.dtype != dtype and literals.dtype is not None:
            raise UnsupportedError(
                f"changing the dtype of this module: {literals.dtype}",
                hint="convert the source model, then capture it again",
            )
        if moved.device != device and literals.device is not None:
            raise UnsupportedError(
                f"moving this module to {moved.device}: {literals.device}",
                hint="move the source model, then capture it again",
            )

"""Literals of a graph that follow ``.half()`` and ``.to()``: dtypes, devices, constants.

Which ones follow is found by tracing a copy of the model that has another dtype and lies on another
device: a literal that changed with the model is tied to a parameter or an input, one that didn't is
fixed (the float32 inside an RMSNorm).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import UnsupportedError
from graphopt.ir import mode
from graphopt.ir.align import Comparison, all_graphs, compare, is_constant, name_of
from graphopt.ir.graphs import arguments, copy_graph, get_argument, lookup, set_argument
from graphopt.ir.stand_ins import StandIns

_FINFO = ("min", "max", "eps", "tiny", "smallest_normal", "resolution")


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

    def also(self, other: Literals) -> Literals:
        """What follows in two graphs."""
        return Literals(self.dtype or other.dtype, self.device or other.device)


@dataclass(frozen=True)
class Variant:
    """A copy of a model and its inputs in another dtype and perhaps on another device."""

    model: nn.Module
    inputs: list[torch.Tensor]
    dtype: torch.dtype
    device: str | None


def variant(model: nn.Module, inputs: Sequence[torch.Tensor], *, meta: bool) -> Variant:
    """A weightless copy of a model in another dtype, on the meta device.

    The dtype is bfloat16: half precision is what models make exceptions for.

    Args:
        model: The model; it isn't changed.
        inputs: Its flat inputs.
        meta: Whether the copy lies on the meta device; else it is fake on its own devices.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floating = [t.dtype for t in (*tensors, *inputs) if t.is_floating_point()]
    other = torch.float64 if torch.bfloat16 in floating else torch.bfloat16
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


def needed(module: fx.GraphModule) -> tuple[bool, bool]:
    """Whether a graph holds literals that might follow (a dtype, a device)."""
    dtype = device = False
    for inner in all_graphs(module):
        for node in inner.graph.nodes:
            if node.op == "get_attr":
                dtype, device = dtype or is_constant(node), device or is_constant(node)
                continue
            if node.op == "call_function":
                values = list(_literals([node.args, node.kwargs]))
                dtype |= any(isinstance(v, torch.dtype) or _is_extreme(v) for v in values)
                device |= any(isinstance(v, torch.device) or v == "cpu" for v in values)
    return dtype, device


def _literals(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _literals(part)
    elif isinstance(value, Mapping):
        yield from _literals(list(value.values()))
    elif not isinstance(value, fx.Node):
        yield value


def _is_extreme(value: Any) -> bool:
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
    return isinstance(value, float) and any(
        value == getattr(torch.finfo(d), name) for d in dtypes for name in _FINFO
    )


def tie(
    module: fx.GraphModule,
    moved: fx.GraphModule,
    root: nn.Module,
    *,
    meta: bool,
    modes: bool = False,
    sizes: StandIns | None = None,
) -> Literals:
    """Tie the literals of a graph that differ from those of its moved variant.

    Sets ``meta["ties"]`` of the graph's nodes.

    Args:
        module: The graph.
        moved: The graph of its `variant`.
        root: The tree that holds the parameters.
        meta: Whether the variant lay on the meta device.
        modes: Whether the variant also was in eval mode; other literals that differ are then
            mode switches.
        sizes: What stands for the graph's free sizes in the variant's, if that has none.  Mode
            switches are then what eval mode turns off: any other literal may differ with a size.

    Returns:
        What follows, and why the rest doesn't.
    """
    found = compare(module, moved, sizes)
    alone = mode.switch_alone(found.alone) if modes else found.alone
    for node in (*found.branching, *alone):
        return _refused(node)
    sources = _Sources(module, root)
    marks = []
    for node, values in found.values.items():
        kinds = {place: _classify(*pair) for place, pair in values.items()}
        rest = {place: pair for place, pair in values.items() if not kinds[place]}
        ties = {p: sources.tie(node, k, values[p][0]) for p, k in kinds.items() if k}
        switched = modes and (not sizes or all(map(_is_off, rest.values())))
        if (rest and not switched) or None in ties.values():
            return _refused(node)
        marks.append((node, ties, rest))
    for node, ties, rest in marks:
        mode.mark(node, rest)
        if ties:
            node.meta["ties"] = ties
    _tie_constants(module, found, sources)
    return Literals(None, None if meta else "devices were not compared")


def tie_devices(
    module: fx.GraphModule, moved: fx.GraphModule, root: nn.Module, sizes: StandIns | None = None
) -> str | None:
    """Tie the device literals of a graph whose variant on the meta device has other ops.

    Some operations are recorded differently on that device.  That is no matter as long as the nodes
    concerned hold no device.

    Args:
        module: The graph.
        moved: The graph of its `variant` on the meta device, in training or in eval mode.
        root: The tree that holds the parameters.
        sizes: What stands for the graph's free sizes in the variant's, if that has none.

    Returns:
        Why devices can't follow, or None where they do.
    """
    found = compare(module, moved, sizes)
    partners = dict(found.pairs)
    sources = _Sources(module, root)
    for inner in all_graphs(module):
        for node in inner.graph.nodes:
            if node.meta.get("constant") or name_of(node).startswith("aten::lift_fresh"):
                continue
            reads = _constants(node)
            places = {p: v for p, v in arguments(node) if isinstance(v, torch.device)}
            ranks = [lookup(inner, str(n.target)).ndim for n in reads]
            other = partners.get(node)
            if other is None and (places or any(ranks)):
                return f"node {node.name} ({node.target}) makes a tensor on a fixed device"
            if other is None:
                continue
            for place, device in places.items():
                if get_argument(other, place) == device:
                    continue
                made = sources.tie(node, "device", device)
                if made is None:
                    return f"nothing says on which device node {node.name} shall be"
                node.meta.setdefault("ties", {})[place] = made
    _tie_constants(module, found, sources)
    return None


def recorded_otherwise(module: fx.GraphModule, moved: fx.GraphModule) -> bool:
    """Whether a trace on the meta device holds calls that make tensors there, and that are new."""
    known = {name_of(node) for node in module.graph.nodes}
    meta = torch.device("meta")
    return any(
        name_of(node) not in known and any(value == meta for _, value in arguments(node))
        for node in moved.graph.nodes
    )


def _tie_constants(module: fx.GraphModule, found: Comparison, sources: _Sources) -> None:
    """Constants that the model's code makes in its own dtype or on its own device follow it."""
    for one, two in found.pairs:
        reads, others = _constants(one), _constants(two)
        if len(reads) != len(others):
            continue
        for mine, other in zip(reads, others, strict=True):
            a = lookup(mine.graph.owning_module, str(mine.target))
            b = lookup(other.graph.owning_module, str(other.target))
            if a.dtype != b.dtype:
                _convert(mine, one, sources.tie(one, "dtype", a.dtype), a.dtype)
            if a.device != b.device:
                _convert(mine, one, sources.tie(one, "device", a.device), a.device)


def _convert(read: fx.Node, user: fx.Node, tie: Tie | None, value: Any) -> None:
    """Let the users of a constant read it through a conversion whose literal is tied."""
    if tie is None:
        return
    found = [node for node in read.users if node.meta.get("constant")]
    if not found:
        with read.graph.inserting_after(read):
            new = read.graph.create_node(
                "call_function", torch.ops.aten.to.dtype_layout, (read,), name=f"{read.name}_to"
            )
        read.replace_all_uses_with(new, delete_user_cb=lambda node: node is not new)
        stack = dict(user.meta.get("nn_module_stack") or {})
        new.meta = {"val": read.meta.get("val"), "nn_module_stack": stack, "constant": True}
        found = [new]
    found[0].update_kwarg(tie.kind, value)
    ties = {**found[0].meta.get("ties", {}), f"kwargs.{tie.kind}": tie}
    found[0].meta["ties"] = ties


def _constants(node: fx.Node) -> list[fx.Node]:
    """The constants that a node reads, directly or through the copy that makes them fresh."""
    result = []
    for read in node.all_input_nodes:
        while name_of(read).startswith("aten::lift_fresh") or read.meta.get("constant"):
            read = read.all_input_nodes[0]
        if is_constant(read):
            result.append(read)
    return result


def _is_off(pair: tuple[Any, Any]) -> bool:
    """Whether a literal is a flag or a number in both of two traces, and nothing in the second."""
    return all(isinstance(value, int | float) for value in pair) and not pair[1]


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
        self.tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}

    def tie(self, node: fx.Node, kind: str, value: Any) -> Tie | None:
        def fits(tensor: torch.Tensor) -> bool:
            floating = kind.startswith("device") or tensor.is_floating_point()
            return floating and Tie("", kind).value(tensor) == value

        prefix = mode.owner_of(node)
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

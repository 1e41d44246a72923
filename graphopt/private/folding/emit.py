"""Writing a folded graph in ATen, with tensors of its own under the source's names."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.align import all_graphs
from graphopt.ir.graphs import assign, bind_graph, lookup
from graphopt.ir.program import Program
from graphopt.ir.skeleton import ADDED, Container
from graphopt.private.folding.affine import Affine, Sources
from graphopt.private.folding.linear import Linear
from graphopt.private.folding.sheet import Sheet, folded

aten = torch.ops.aten

_CONVS = {
    (1, False): aten.conv1d.default,
    (2, False): aten.conv2d.default,
    (3, False): aten.conv3d.default,
    (1, True): aten.conv_transpose1d.default,
    (2, True): aten.conv_transpose2d.input,
    (3, True): aten.conv_transpose3d.input,
}


def emit(sheet: Sheet, program: Program, *, double: bool = False) -> Program:
    """The program of a sheet in eval mode; it shares no tensor with the source.

    Args:
        sheet: The sheet; it is used up.
        program: The program that it was read from.
        double: Write constants in float64, whatever the source has.
    """
    sheet.sweep()
    _Writer(sheet, program, double).run()
    signature = program.eval_signature or program.signature
    root = _tree(sheet.module, program)
    if not double:
        _retie(sheet.module, root, program.skeleton.root)
    bound = bind_graph(sheet.module, root)
    bound.graph.lint()
    return Program(
        bound, None, signature, program.skeleton.rebuilt(root), program.history,
        literals=program.literals,
    )  # fmt: skip


class _Writer:
    """Writes the ops of one sheet."""

    def __init__(self, sheet: Sheet, program: Program, double: bool) -> None:
        self.sheet, self.graph, self.double = sheet, sheet.graph, double
        self.root = sheet.module  # a copy with plain modules of its own
        self.taken = {str(n.target) for n in self.graph.find_nodes(op="get_attr")}
        self.taken |= {name for name, _ in program.skeleton.root.named_modules()}
        self.read: dict[tuple[str, torch.dtype], fx.Node] = {}

    def run(self) -> None:
        """Write all."""
        self._keep_attributes()
        for node in list(self.graph.nodes):
            form = self.sheet.forms.get(node)
            if node.target is folded or _is_norm(node, form):
                with self.graph.inserting_before(node):
                    new = self._write(node, form, self.sheet.data(node))
                self.sheet.replace(node, new)
            elif node.op == "call_function" and node in self.sheet.known:
                self._write_known(node)
        self.sheet.sweep()

    def _keep_attributes(self) -> None:
        """What stays as it is, copied once however often it is read."""
        copies: dict[int, Any] = {}
        for node in self.graph.find_nodes(op="get_attr"):
            value = lookup(self.sheet.module, str(node.target))
            if isinstance(value, Tensor):
                value = copies.setdefault(id(value), _own(value))
            assign(self.root, str(node.target), value)

    def _write(self, node: fx.Node, form: Any, data: fx.Node) -> fx.Node:
        if isinstance(form, Linear):
            return self._linear(node, form, data)
        assert isinstance(form, Affine)
        result = data
        if form.scales:
            result = self._call(node, aten.mul.Tensor, result, self._operand(node, form, "scale"))
        if form.shifts:
            result = self._call(node, aten.add.Tensor, result, self._operand(node, form, "shift"))
        return result

    def _linear(self, node: fx.Node, form: Linear, data: fx.Node) -> fx.Node:
        weight = self._constant(node, form.weight, form.home, form.sources)
        bias = None
        if form.bias is not None:
            bias = self._constant(node, form.bias, _beside(form.home, "bias"), form.sources)
        if form.dims == 0:
            return self._call(node, aten.linear.default, data, weight, bias)
        stride, padding, dilation = (list(v) for v in (form.stride, form.padding, form.dilation))
        if form.transposed:
            rest: list[Any] = [stride, padding, list(form.output_padding), form.groups, dilation]
        else:
            rest = [stride, padding, dilation, form.groups]
        return self._call(node, _CONVS[form.dims, form.transposed], data, weight, bias, *rest)

    def _operand(self, node: fx.Node, form: Affine, name: str) -> Any:
        value: Tensor = getattr(form, name)
        if not form.sources:
            return float(value)
        if form.axis is not None:
            value = value.reshape(-1, *[1] * (-1 - form.axis))
        return self._constant(node, value, _beside(_home(form.sources), name), form.sources)

    def _write_known(self, node: fx.Node) -> None:
        """Store a value that other ops read, instead of how it is made."""
        known = self.sheet.known[node]
        readers = [u for u in node.users if u not in self.sheet.known]
        if not readers or known.tied:
            return
        with self.graph.inserting_before(node):
            home = _beside(
                _home(known.sources), f"{_home(known.sources).split('.')[-1]}_{node.name}"
            )
            new = self._constant(node, known.value, home, known.sources)
        self.sheet.replace(node, new)

    def _constant(self, node: fx.Node, value: Tensor, name: str, sources: Sources) -> fx.Node:
        """A new tensor of the node's dtype, under a name that nobody has."""
        dtype = node.meta["val"].dtype
        if value.is_floating_point():
            value = value if self.double else value.to(dtype)
        path, count = name, 0
        while path in self.taken:
            count += 1
            path = f"{name}_{count}"
        self.taken.add(path)
        value = value.clone(memory_format=torch.contiguous_format)
        if value.is_floating_point():
            value = nn.Parameter(value, requires_grad=False)
        assign(self.root, path, value)
        new = self.graph.create_node("get_attr", path)
        new.meta["val"] = value
        new.meta["sources"] = sources
        return new

    def _call(self, like: fx.Node, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        copied = ("stack_trace", "nn_module_stack", "val")
        node.meta = {k: v for k, v in like.meta.items() if k in copied}
        return node


def _is_norm(node: fx.Node, form: Any) -> bool:
    """Whether a node is a batch norm that folded into nothing: one scale and one shift."""
    return isinstance(form, Affine) and node.target is aten.batch_norm.default


def _own(value: Tensor) -> Tensor:
    copied = value.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(value, nn.Parameter) else copied


def _home(sources: Sources) -> str:
    """Whose name a value gets that is made of several: a weight's, not a public coefficient's."""
    own = [name for name in sources if name.split(".")[0] != ADDED]
    return (own or list(sources))[0]


def _beside(path: str, name: str) -> str:
    """Another name in the same module."""
    return ".".join([*path.split(".")[:-1], name])


def _tree(module: fx.GraphModule, program: Program) -> Container:
    """Containers for the tensors that a graph reads, at the paths of the source's."""
    old = program.skeleton.root
    root = _like(old, "")
    for node in module.graph.find_nodes(op="get_attr"):
        value = lookup(module, str(node.target))
        if isinstance(value, Tensor):
            _plant(root, old, str(node.target), value)
    return root


def _plant(root: Container, old: Container, path: str, value: Tensor) -> None:
    """Put a tensor at its path, with the containers on the way."""
    *parents, name = path.split(".")
    place: nn.Module = root
    source: nn.Module | None = old
    for depth, part in enumerate(parents):
        source = None if source is None else source._modules.get(part)
        inner = place._modules.get(part)
        if inner is None:
            inner = place._modules[part] = _like(source, ".".join(parents[: depth + 1]))
        place = inner
    if isinstance(value, nn.Parameter):
        place._parameters[name] = value
        return
    place._buffers[name] = value
    persists = source is not None and name in source._buffers
    if not persists or name in source._non_persistent_buffers_set:  # type: ignore[union-attr]
        place._non_persistent_buffers_set.add(name)


def _retie(module: fx.GraphModule, root: Container, old: Container) -> None:
    """Let literals that follow a tensor which is gone follow another one like it."""
    tensors = {**dict(root.named_parameters()), **dict(root.named_buffers())}
    for inner in all_graphs(module):
        for node in inner.graph.nodes:
            ties = {}
            for place, tie in node.meta.get("ties", {}).items():
                if tie.input or tie.source in tensors:
                    ties[place] = tie
                    continue
                gone = lookup(old, tie.source)
                like = [p for p, t in tensors.items() if _alike(t, gone)]
                if like:
                    ties[place] = dataclasses.replace(tie, source=like[0])
            if "ties" in node.meta:
                node.meta["ties"] = ties


def _alike(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.device == other.device


def _like(source: Any, path: str) -> Container:
    container = type(source)() if isinstance(source, Container) else Container()
    container._path = path
    if source is not None:
        container._class_name, container._repr = source._class_name, source._repr
    container.training = False
    return container

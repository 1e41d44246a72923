"""A program whose sites pay for what they keep alone.

    y = relu(x)

becomes, where some positions are kept,

    flat = flatten(x);  a = relu(flat[:, kept]);  b = polynomial(flat[:, rest])
    y = unflatten(cat(a, b)[:, order])

so that under a secure protocol, where gathering is free, the comparisons are those of ``kept``. A
mask instead, ``m relu(x) + (1 - m) p(x)``, would compare every element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from graphopt.ir.graphs import bind_graph, copy_graph
from graphopt.ir.metadata import refreshed
from graphopt.ir.program import Program
from graphopt.ir.skeleton import Container, copy_tree
from graphopt.passes.linearize.modes import training_names
from graphopt.passes.linearize.normalisers import Left, Normaliser, write_normaliser
from graphopt.passes.linearize.replacements import Replacement
from graphopt.passes.linearize.sites import read_by
from graphopt.passes.linearize.writing import Writing, added_container

aten = torch.ops.aten


def linearized(
    program: Program,
    replacements: Sequence[Replacement],
    statistics: Mapping[str, Tensor],
    normalisers: Sequence[Normaliser | Left] = (),
) -> Program:
    """The program with its sites replaced.

    Args:
        program: The program; it is not changed.
        replacements: What becomes of which site.
        statistics: New running statistics of BatchNorms, by path.
        normalisers: What becomes of each softmax that was set apart.
    """
    root = _with_statistics(program, statistics)
    names, evaluated = training_names(program), program.eval_module
    written = _written(program.module, names, replacements, root, normalisers)
    module = bind_graph(written, root)
    if evaluated is not None:
        # written into a tree of its own at the same paths, then bound to the first one's tensors
        beside = _with_statistics(program, statistics)
        evaluated = bind_graph(_written(evaluated, {}, replacements, beside), root)
    skeleton = program.skeleton.rebuilt(root)
    return refreshed(program.replace(module=module, eval_module=evaluated, skeleton=skeleton))


def _written(
    source: fx.GraphModule,
    names: Mapping[str, str],
    replacements: Sequence[Replacement],
    root: Container,
    normalisers: Sequence[Normaliser | Left] = (),
) -> fx.GraphModule:
    """A copy of a graph with its sites replaced, which may have other names in it."""
    module = copy_graph(source)
    added = added_container(root)
    nodes = {node.name: node for node in module.graph.nodes}
    for each in replacements:
        if not each.is_whole:
            node = nodes[names.get(each.site.name, each.site.name)]
            _Rewriting(module, node, each, added).run()
    for normaliser in normalisers:
        write_normaliser(module, nodes[normaliser.call.name], normaliser, added)
    module.graph.lint()
    return module


def _with_statistics(program: Program, statistics: Mapping[str, Tensor]) -> Container:
    """The program's tree of containers with other statistics."""
    root = program.skeleton.root
    replaced = {id(root.get_buffer(path)): value for path, value in statistics.items()}
    return copy_tree(root, type(root), replaced)


class _Rewriting(Writing):
    """One site's rewriting."""

    def __init__(
        self, module: fx.GraphModule, node: fx.Node, replacement: Replacement, added: Container
    ) -> None:
        shown = f"{replacement.kind}, {len(replacement.kept)} kept"
        super().__init__(module, node, added, replacement.site.name, shown)
        self.replacement = replacement
        self.site = replacement.site

    def run(self) -> None:
        """Put the replacement in the node's place."""
        with self.graph.inserting_before(self.node):
            x = read_by(self.node)
            result = self._all(x) if not len(self.replacement.kept) else self._some(x)
        self.node.replace_all_uses_with(result)
        self.graph.erase_node(self.node)

    def _all(self, x: fx.Node) -> fx.Node:
        """Every position replaced."""
        axis = self.site.channel
        beside = 0 if axis is None else len(self.site.shape) - 1 - axis
        base = self._averaged(x) if self.site.is_pool else x
        return self._polynomial(base, None, beside)

    def _some(self, x: fx.Node) -> fx.Node:
        """Kept positions gathered, the others replaced, both put back in order."""
        start, stop = self.site.block
        kept, rest = self.replacement.kept, self.replacement.rest()
        order = torch.cat([kept, rest]).argsort()
        flat = self.call(aten.flatten.using_ints, x, start, stop - 1)
        positions = [self.tensor("kept", kept), self.tensor("rest", rest)]
        parts = [self.call(aten.index_select.default, flat, start, p) for p in positions]
        exact = self._exact(parts[0], kept)
        channels = self.site.channel_of_positions()[rest]
        beside = len(self.site.shape) - stop
        replaced = self._polynomial(parts[1], channels, beside)
        joined = self.call(aten.cat.default, [exact, replaced], start)
        ordered = self.call(aten.index_select.default, joined, start, self.tensor("order", order))
        return self.call(aten.unflatten.int, ordered, start, list(self.site.sizes))

    def _exact(self, x: fx.Node, kept: Tensor) -> fx.Node:
        """The non-linearity itself on what is kept."""
        others = list(self.node.args[1:])
        if self.site.has_slopes:
            # along dimension 1, the block's first one, whatever dimension has the channels
            channels = self.tensor("slopes", kept // math.prod(self.site.sizes[1:]))
            others[0] = self.call(aten.index_select.default, others[0], 0, channels)
        copied = self.graph.node_copy(self.node)
        copied.args = (x, *others)
        return copied

    def _polynomial(self, x: fx.Node, channels: Tensor | None, beside: int) -> fx.Node:
        """The replacement, whose coefficients have so many dimensions of size one behind."""
        values = self.replacement.coefficients
        if values is None:
            return x
        dtype = self.node.meta["val"].dtype
        all_ = self.parameter("coefficients", values.to(dtype))
        if channels is not None and self.site.channel is not None:
            places = self.tensor("channels", channels)
            all_ = self.call(aten.index_select.default, all_, 1, places)
        parts = []
        for power in range(len(values)):
            part = self.call(aten.select.int, all_, 0, power)
            shape = [-1, *[1] * beside]
            parts.append(self.call(aten.view.default, part, shape) if beside else part)
        powers = self._powers(x, len(values) - 1)
        result = parts[0]
        for part, power in zip(parts[1:], powers, strict=True):
            term = self.call(aten.mul.Tensor, power, part)
            result = self.call(aten.add.Tensor, term, result)
        return result

    def _powers(self, x: fx.Node, degree: int) -> list[fx.Node]:
        """``x``, ``x^2``, ... with as few products as there can be one after the other."""
        found = [x]
        if degree >= 2:
            found.append(self.call(aten.square.default, x))
        if degree >= 3:
            found.append(self.call(aten.mul.Tensor, found[1], x))
        if degree >= 4:
            found.append(self.call(aten.square.default, found[1]))
        return found

    def _averaged(self, x: fx.Node) -> fx.Node:
        target, args = self.site.average()
        return self.call(target, x, *args)

"""Writing lines of computation, cut into stages, as boxed FX graph modules."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.utils._pytree as pytree
from torch import fx

from graphopt.runtime.boxed import BoxedCodeGen
from graphopt.runtime.plan import Operand, Stage


@dataclass(eq=False)
class Instance:
    """One value at run time: which node it is, and the how-manyeth time it was produced.

    Attributes:
        name: Unique among all stages.
        stage: Index of the stage that makes it; -1: it comes from outside.
        last: Index of the last stage that reads it; -1: nobody does.
    """

    name: str
    stage: int
    last: int = -1


@dataclass(frozen=True)
class Ref:
    """An argument that is an instance."""

    instance: Instance


@dataclass
class Line:
    """One node of a stage's graph.

    Attributes:
        target: What is called.
        args: Positional arguments; instances as `Ref`s, module constants as their joint node.
        kwargs: Keyword arguments, likewise.
        result: The instance made.
        pinned: Whether it runs even if nobody reads the result.
        node: The joint node it comes from, whose metadata is kept.
    """

    target: Any
    args: Any
    kwargs: Any
    result: Instance
    pinned: bool = False
    node: fx.Node | None = None

    def reads(self) -> Iterator[Instance]:
        """Instances among the arguments."""
        for leaf in _leaves((self.args, self.kwargs)):
            if isinstance(leaf, Ref):
                yield leaf.instance


@dataclass(frozen=True)
class HandOver:
    """A final gradient.

    Attributes:
        operand: Whose gradient it is.
        value: The gradient.
        memory: The operand and its views: whoever gets the gradient may write to them.
    """

    operand: Operand
    value: Instance
    memory: list[Instance]


@dataclass
class Cut:
    """The content of one stage."""

    lines: list[Line] = field(default_factory=list)
    gradients: list[HandOver] = field(default_factory=list)


def write_stages(
    root: fx.GraphModule, cuts: Sequence[Cut], results: Sequence[Instance], *, stepping: bool
) -> list[Stage]:
    """Writes every cut as a stage, leaving out lines that nobody needs.

    Args:
        root: Holds the constants and sub-graphs that lines refer to.
        cuts: The lines of each stage, forward first.
        results: Instances returned to the caller at the end of the first stage.
        stepping: Whether operands may be written to as soon as they get their gradient.
    """
    lines = _live_lines(cuts, results)
    if stepping:
        _wait_for_readers(cuts)
    return [_write(root, i, cut, lines[i], results if i == 0 else ()) for i, cut in enumerate(cuts)]


def _live_lines(cuts: Sequence[Cut], results: Sequence[Instance]) -> list[list[Line]]:
    """Drops lines without readers, last to first, and records each instance's last reader."""
    needed = {id(r) for r in results}
    kept: list[list[Line]] = [[] for _ in cuts]
    for index in reversed(range(len(cuts))):
        for gradient in cuts[index].gradients:
            needed.add(id(gradient.value))
            gradient.value.last = max(gradient.value.last, index)
        for line in reversed(cuts[index].lines):
            if line.pinned or id(line.result) in needed:
                kept[index].append(line)
                for instance in line.reads():
                    needed.add(id(instance))
                    instance.last = max(instance.last, index)
        kept[index].reverse()
    return kept


def _wait_for_readers(cuts: Sequence[Cut]) -> None:
    """Gradients wait for the last reader of their operand, which may change then."""
    for index, cut in enumerate(cuts):
        for gradient in list(cut.gradients):
            last = max(instance.last for instance in gradient.memory)
            if last > index:
                cut.gradients.remove(gradient)
                cuts[last].gradients.append(gradient)
                gradient.value.last = max(gradient.value.last, last)


def _write(
    root: fx.GraphModule, index: int, cut: Cut, lines: list[Line], results: Sequence[Instance]
) -> Stage:
    writer = _StageWriter(root, index)
    takes = writer.placeholders(lines)
    for line in lines:
        writer.write(line)
    gives = writer.outputs(lines, cut, results)
    module = fx.GraphModule(root, writer.graph, class_name=f"Stage{index}")
    return Stage(
        module=module,
        takes=tuple(i.name for i in takes),
        frees=frozenset(i.name for i in takes if i.last <= index and i not in _handed(cut)),
        gives=tuple(i.name for i in gives),
        gradients=tuple((g.operand, g.value.name) for g in cut.gradients),
        leaves=_leaves_table(index, cut),
    )


def _handed(cut: Cut) -> list[Instance]:
    return [gradient.value for gradient in cut.gradients]


def _leaves_table(index: int, cut: Cut) -> tuple[bool, ...]:
    """For each gradient whether it is the last use of its value."""
    seen: set[str] = set()
    leaves = []
    for value in reversed(_handed(cut)):
        leaves.append(value.last <= index and value.name not in seen)
        seen.add(value.name)
    return tuple(reversed(leaves))


class _StageWriter:
    def __init__(self, root: fx.GraphModule, index: int) -> None:
        self.root, self.index = root, index
        self.graph = fx.Graph()
        self.graph.set_codegen(BoxedCodeGen())
        self.nodes: dict[Instance, fx.Node] = {}
        self.constants: dict[str, fx.Node] = {}

    def placeholders(self, lines: list[Line]) -> list[Instance]:
        takes: dict[Instance, None] = {}
        for line in lines:
            for instance in line.reads():
                if instance.stage < self.index:
                    takes[instance] = None
        for instance in takes:
            self.nodes[instance] = self.graph.placeholder(instance.name)
        return list(takes)

    def write(self, line: Line) -> None:
        args, kwargs = pytree.tree_map(
            self._argument, (line.args, line.kwargs), is_leaf=lambda a: isinstance(a, slice)
        )
        node = self.graph.create_node(
            "call_function", line.target, args, kwargs, name=line.result.name
        )
        if line.node is not None:
            node.meta = dict(line.node.meta)
        self.nodes[line.result] = node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Ref):
            return self.nodes[value.instance]
        if isinstance(value, fx.Node):
            name = str(value.target)
            if name not in self.constants:
                first = next(iter(self.graph.nodes), None)
                with self.graph.inserting_before(first):
                    self.constants[name] = self.graph.get_attr(name)
            return self.constants[name]
        if isinstance(value, slice):
            return slice(*(self._argument(v) for v in (value.start, value.stop, value.step)))
        return value

    def outputs(self, lines: list[Line], cut: Cut, results: Sequence[Instance]) -> list[Instance]:
        made = [line.result for line in lines]
        gives = list(dict.fromkeys(results))
        gives += [i for i in made if i.last > self.index and i not in gives]
        gives += [i for i in _handed(cut) if i.stage == self.index and i not in gives]
        for instance in gives:
            if instance not in self.nodes:  # a result that is a view of an operand
                raise AssertionError(f"{instance.name} is returned but not computed here")
        self.graph.output(tuple(self.nodes[i] for i in gives))
        return gives


def _leaves(arguments: Any) -> list[Any]:
    leaves = pytree.tree_leaves(arguments, is_leaf=lambda a: isinstance(a, slice))
    return [
        part
        for leaf in leaves
        for part in ((leaf.start, leaf.stop, leaf.step) if isinstance(leaf, slice) else (leaf,))
    ]

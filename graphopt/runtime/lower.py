"""Turns an execution sequence over a joint graph into the stages of a `PlannedStep`.

A sequence is a list of `Step`s; running a node again makes a new instance of its values, and
later readers get the newest one. Views are made on demand, once for each instance of their base;
sizes are read as soon as the tensor they belong to exists.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from graphopt.ir.joint import JointInput, JointView
from graphopt.ir.ops import is_random, out_overload, recomputed_form
from graphopt.ir.storage import Role, StorageMap
from graphopt.runtime.plan import Operand, PlannedStep
from graphopt.runtime.stages import Cut, HandOver, Instance, Line, Ref, write_stages

# A view was traced for the layouts of the examples, and torch's own rules for the layouts of
# results are not always those of its kernels: reshape is the same where it can be, else it copies.
_FOR_ANY_LAYOUT = {
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
    torch.ops.aten._unsafe_view.default: torch.ops.aten.reshape.default,
}


@dataclass(frozen=True)
class Step:
    """One entry of a sequence.

    Attributes:
        kind: `run` nodes in a row; the `loss`, outside of the plan; `turn` from forward to
            backward; `commit` the new value of a mutated operand; `hand_over` a final gradient.
        nodes: The nodes run.
        reuse: Node run -> the argument whose memory takes its result.
        node: The node whose value is committed or handed over.
        of: The operand committed to, or whose gradient it is.
    """

    kind: Literal["run", "loss", "turn", "commit", "hand_over"]
    nodes: tuple[fx.Node, ...] = ()
    reuse: Mapping[fx.Node, fx.Node] = field(default_factory=dict)
    node: fx.Node | None = None
    of: JointInput | None = None


def lower(
    view: JointView, storage: StorageMap, steps: Sequence[Step], *, stepping: bool = False
) -> PlannedStep:
    """Writes the graphs of a planned step.

    Args:
        view: The joint graph.
        storage: Roles and owners of its nodes.
        steps: The sequence: every computation after what it reads, at most one `turn`.
        stepping: Whether operands may be written to as soon as they get their gradient.

    Returns:
        The planned step, its graphs boxed.
    """
    lowering = _Lowering(view, storage, stepping)
    for step in steps:
        lowering.take(step)
    return lowering.finish()


@dataclass
class _Lowering:
    view: JointView
    storage: StorageMap
    stepping: bool
    current: dict[fx.Node, Instance] = field(default_factory=dict)
    made: dict[fx.Node, int] = field(default_factory=lambda: defaultdict(int))
    views_of: dict[Instance, list[fx.Node]] = field(default_factory=lambda: defaultdict(list))
    memory: dict[Instance, list[Instance]] = field(default_factory=dict)
    cuts: list[Cut] = field(default_factory=lambda: [Cut()])
    results: dict[int, Instance] = field(default_factory=dict)
    mutates: set[str] = field(default_factory=set)
    turned: bool = False

    def __post_init__(self) -> None:
        self.sizes_of = _sizes_by_owner(self.view.graph, self.storage)
        for joint_input in self.view.inputs:
            instance = Instance(joint_input.node.name, stage=-1)
            self.current[joint_input.node] = instance
            self.memory[instance] = [instance]
            if joint_input.kind != "tangent":
                self._read_sizes(joint_input.node)

    # -- steps -------------------------------------------------------------------------------

    def take(self, step: Step) -> None:
        """Appends one step."""
        if step.kind == "loss":
            pass  # the caller's
        elif step.kind == "turn":
            self._turn()
        elif step.kind == "hand_over":
            assert step.node is not None
            assert step.of is not None
            operand = Operand(step.of.kind, step.of.name)  # type: ignore[arg-type]
            owner = self.current[step.of.node]
            gradient = HandOver(operand, self._resolve(step.node), self.memory[owner])
            self.cuts[-1].gradients.append(gradient)
        else:
            if self.cuts[-1].gradients:
                self.cuts.append(Cut())
            if step.kind == "commit":
                self._commit(step)
            for node in step.nodes:
                self._run(node, step.reuse.get(node))

    def _turn(self) -> None:
        self._collect_results()
        self.turned = True
        self.cuts.append(Cut())
        for joint_input in self.view.inputs_of("tangent"):
            self._read_sizes(joint_input.node)

    def _commit(self, step: Step) -> None:
        assert step.node is not None
        assert step.of is not None
        arguments = (Ref(self._resolve(step.of.node)), Ref(self._resolve(step.node)))
        name = f"{step.of.node.name}_commit"
        written = Instance(name, len(self.cuts) - 1)
        copy = torch.ops.aten.copy_.default
        self.cuts[-1].lines.append(Line(copy, arguments, {}, written, pinned=True))
        self.mutates.add(step.of.node.name)

    def _run(self, node: fx.Node, reused: fx.Node | None) -> None:
        again = self.made[node] > 0
        form = recomputed_form(node) if again else None
        target, args = (form.target, form.args) if form else (node.target, node.args)
        kwargs = {} if form else node.kwargs
        if reused is not None:
            target, kwargs = written_over(node, reused)
        projections = [u for u in node.users if self.storage.role[u] is Role.PROJECTION]
        scalars = [u for u in node.users if self._is_scalar_part(u)]
        for value in (node, *projections):
            self._forget_views(value)
        self._append(node, target, args, kwargs, pinned=True)
        for part in (*projections, *scalars):
            if form is None or part.args[1] in form.results:
                self._append(part, operator.getitem, part.args, {})
        if not again:
            for value in (node, *projections):
                self._read_sizes(value)

    def _is_scalar_part(self, user: fx.Node) -> bool:
        return user.target is operator.getitem and self.storage.role[user] is Role.SYMBOL

    # -- instances ---------------------------------------------------------------------------

    def _resolve(self, node: fx.Node) -> Instance:
        """The newest instance of a node, making views and sizes where missing."""
        if node not in self.current:
            if self.storage.role[node] in (Role.COMPUTE, Role.PROJECTION):
                raise AssertionError(f"{node} is read before it is computed")
            self._append(node, node.target, node.args, node.kwargs)
            owner = self.storage.base[node]
            if owner is not node and owner in self.current:
                self.views_of[self.current[owner]].append(node)
                if self.current[owner] in self.memory:
                    self.memory[self.current[owner]].append(self.current[node])
        return self.current[node]

    def _append(
        self, node: fx.Node, target: Any, args: Any, kwargs: Any, *, pinned: bool = False
    ) -> None:
        args, kwargs = fx.node.map_arg(args, self._use), fx.node.map_arg(kwargs, self._use)
        target = _FOR_ANY_LAYOUT.get(target, target)
        times = self.made[node]
        self.made[node] += 1
        result = Instance(f"{node.name}_again{times}" if times else node.name, len(self.cuts) - 1)
        self.current[node] = result
        self.cuts[-1].lines.append(Line(target, args, kwargs, result, pinned, node))

    def _use(self, node: fx.Node) -> Any:
        if self.storage.role[node] is Role.CONSTANT:
            return node
        return Ref(self._resolve(node))

    def _forget_views(self, node: fx.Node) -> None:
        """A new instance of `node` comes: views of the old one are not views of it."""
        if (old := self.current.get(node)) is not None:
            for view in self.views_of.pop(old, ()):
                self.current.pop(view, None)

    def _read_sizes(self, node: fx.Node) -> None:
        for size in self.sizes_of.get(node, ()):
            self._resolve(size)

    # -- the end -----------------------------------------------------------------------------

    def _collect_results(self) -> None:
        for output in self.view.outputs_of("output"):
            if output.node is not None and isinstance(output.of, int):
                self.results[output.of] = self._resolve(output.node)

    def finish(self) -> PlannedStep:
        """Writes the stages."""
        if not self.turned:
            self._collect_results()
        last = self.cuts[-1]
        if self.turned and not last.gradients and not any(line.pinned for line in last.lines):
            self.cuts.pop()
        stages = write_stages(
            self.view.module, self.cuts, tuple(self.results.values()), stepping=self.stepping
        )
        read = {name for stage in stages for name in stage.takes} | self.mutates
        return PlannedStep(
            operands={
                i.node.name: Operand(i.kind, i.name)
                for i in self.view.inputs
                if i.kind != "tangent" and i.node.name in read
            },
            forward=stages[0],
            backward=tuple(stages[1:]),
            results={position: instance.name for position, instance in self.results.items()},
            passthrough={p: _unchanged(*w) for p, w in self.view.passthrough.items()},
            duplicates=dict(self.view.duplicates),
            tangents={int(i.name): i.node.name for i in self.view.inputs_of("tangent")},
            out_requires_grad=self.view.out_requires_grad,
            num_outputs=self.view.num_outputs,
            unplanned=self._unplanned(),
            random=any(is_random(node) for node in self.view.graph.nodes),
            mutates=frozenset(self.mutates),
            restores=frozenset(self.mutates & _decisive(self.view)),
        )

    def _unplanned(self) -> tuple[Operand, ...]:
        planned = {o.of for o in self.view.outputs_of("gradient") if o.node is not None}
        return tuple(
            Operand(i.kind, i.name)  # type: ignore[arg-type]
            for i in self.view.inputs
            if i.requires_grad and i not in planned
        )


def written_over(node: fx.Node, reused: fx.Node) -> tuple[Any, dict[str, Any]]:
    """The call that leaves a node's result in the memory of one of its arguments."""
    found = out_overload(node.target)
    assert found is not None, f"{node.target} cannot write over its arguments"
    overload, name = found
    return overload, {**node.kwargs, name: reused}


def _unchanged(kind: str, what: Any) -> Any:
    """A constant as it is; an input or attribute as an operand."""
    if kind == "constant":
        return what
    return Operand("input" if kind == "input" else "buffer", str(what))


def _sizes_by_owner(graph: fx.Graph, storage: StorageMap) -> dict[fx.Node, list[fx.Node]]:
    """Storage owner -> the nodes that read a size of it or of one of its views."""
    sizes: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if storage.role[node] is Role.SYMBOL:
            for argument in node.all_input_nodes:
                if storage.role[argument] is not Role.SYMBOL:
                    sizes[storage.base[argument]].append(node)
    return sizes


def _decisive(view: JointView) -> set[str]:
    """Names of the operands whose values outputs depend on (statistics of a norm are not)."""
    waiting = [o.node for o in view.outputs_of("output") if o.node is not None]
    seen = set(waiting)
    while waiting:
        fresh = _reads(waiting.pop()) - seen
        seen |= fresh
        waiting += fresh
    return {i.node.name for i in view.inputs if i.node in seen}


def _reads(node: fx.Node) -> set[fx.Node]:
    form = recomputed_form(node)
    found: set[fx.Node] = set()
    fx.node.map_arg(form.args if form else (node.args, node.kwargs), lambda n: found.add(n))
    return found

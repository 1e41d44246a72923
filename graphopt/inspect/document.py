"""What a dump shows: a program, its joint graph, or its plan, in one form for all printers.

A `Document` is a list of segments (flat FX graphs) that share one space of names: a program and a
joint graph have one segment, a plan has one for the forward pass and one for each piece of the
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from graphopt.cost.sizes import concrete
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.ir.joint import JointView, joint_view
from graphopt.ir.saved import SavedTable, saved_table

if TYPE_CHECKING:
    from graphopt.ir.program import Program

View = Literal["program", "joint", "plan"]
Mode = bool | Mapping[str, bool]  # of the whole model, or of each module path


@dataclass(frozen=True)
class Binding:
    """What a placeholder of a segment stands for.

    Attributes:
        kind: A tensor of the state (parameter, buffer or constant), an input, a tangent, or a value
            that an earlier segment made.
        name: The tensor's path, the input's name, ``tangent_<output>``, or the value's name.
    """

    kind: Literal["state", "input", "tangent", "value"]
    name: str


@dataclass(frozen=True)
class Result:
    """What an entry of a segment's output stands for.

    Attributes:
        kind: A program output, a gradient, the new value of a buffer or input, or a value that a
            later segment reads.
        name: The output's position, whose gradient, what is mutated, or the value's name.
        value: The node that gives it; a constant, or None for an absent one.
    """

    kind: Literal["output", "gradient", "mutation", "value"]
    name: str
    value: Any


@dataclass(frozen=True)
class Segment:
    """One flat graph of a document.

    Attributes:
        title: What it is.
        module: The graph.
        bindings: What each placeholder stands for.
        results: What the outputs stand for.
        phase: ``forward``, ``backward``, or ``joint`` where each node says which it is.
    """

    title: str
    module: fx.GraphModule
    bindings: Mapping[fx.Node, Binding]
    results: tuple[Result, ...]
    phase: Literal["forward", "backward", "joint"] = "forward"


@dataclass(frozen=True)
class Slot:
    """A tensor that comes from outside: its name, sizes and type.

    Attributes:
        name: Its name.
        shape: Example sizes.
        dtype: Its dtype.
        trainable: Whether it requires a gradient.
        constant: The tensor itself where no ``state_dict`` has it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = False
    constant: torch.Tensor | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class Document:
    """Everything that a dump shows.

    Attributes:
        view: ``program``, ``joint`` or ``plan``.
        title: Class of the source model.
        inputs: The inputs, in order.
        tangents: The gradients of outputs that the backward pass starts from.
        state: Parameters, buffers and constants by path.
        segments: The graphs.
        saved: The saved-for-backward table (of a program in which something requires a gradient).
        outputs: Number of flat outputs.
        passthrough: Output position -> ``(kind, name)`` of what is returned unchanged, or
            ``("constant", value)``, or ``("output", earlier position)``.
        history: The passes that ran, as pipeline texts.
    """

    view: View
    title: str
    inputs: tuple[Slot, ...]
    tangents: tuple[Slot, ...]
    state: Mapping[str, Slot]
    segments: tuple[Segment, ...]
    outputs: int
    saved: SavedTable | None = None
    passthrough: Mapping[int, tuple[str, Any]] = field(default_factory=dict)
    history: tuple[str, ...] = ()


def document(program: Program, view: str = "program", *, training: Mode = True) -> Document:
    """Prepare a program for printing.

    Args:
        program: The program.
        view: ``program``: the forward graph; ``joint``: forward and backward as one graph;
            ``plan``: the stages that a planned step runs.
        training: The mode that is shown: of the whole model, or of each module path.

    Raises:
        UnsupportedError: No such view; a plan is asked for and there is none; the joint graph can't
            be traced.
    """
    if view == "program":
        return _program_document(program, training)
    if view == "joint":
        return _joint_document(program, training)
    if view == "plan":
        return _plan_document(program, training)
    raise UnsupportedError(f"no view {view!r}", hint="one of program, joint, plan")


def is_training(mode: Mode) -> bool:
    """Whether a mode is that of a training step: the model's own flag counts."""
    return mode if isinstance(mode, bool) else mode.get("", True)


def saved_or_none(program: Program, training: Mode) -> SavedTable | None:
    """The saved-for-backward table, or None where the graph can't be run on fake tensors."""
    try:
        return saved_table(program, training=training)
    except GraphoptError:
        return None


def attributes_of(module: fx.GraphModule) -> Iterator[tuple[str, Any]]:
    """``(path, value)`` of every ``get_attr`` node of a graph and its sub-graphs."""
    for node in module.graph.find_nodes(op="get_attr"):
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if isinstance(value, fx.GraphModule):
            yield from attributes_of(value)
        else:
            yield str(node.target), value


def _program_document(program: Program, training: Mode) -> Document:
    module = program.specialize(training)
    leaves = program.signature.inputs
    holders = module.graph.find_nodes(op="placeholder")
    bindings = {n: Binding("input", leaf.name) for n, leaf in zip(holders, leaves, strict=True)}
    values = _output_values(module)
    results = tuple(Result("output", str(i), value) for i, value in enumerate(values))
    segment = Segment("forward", module, bindings, results)
    saved = saved_or_none(program, training)
    return Document(
        "program",
        _title(program),
        _inputs(program),
        (),
        _state(program, module),
        (segment,),
        len(values),
        saved if saved is not None and saved.values else None,
        history=_history(program),
    )


def traced_joint(program: Program, training: Mode) -> JointView:
    """The joint graph of a program, its inputs requiring gradients as the examples did.

    Raises:
        UnsupportedError: It can't be traced.
    """
    module = program.specialize(training)
    return joint_view(module, program.fake_inputs())


def _joint_document(program: Program, training: Mode) -> Document:
    view = traced_joint(program, training)
    leaves = program.signature.inputs
    bindings: dict[fx.Node, Binding] = {}
    tangents: list[Slot] = []
    for entry in view.inputs:
        if entry.kind in ("parameter", "buffer"):
            bindings[entry.node] = Binding("state", entry.name)
        elif entry.kind == "input":
            bindings[entry.node] = Binding("input", leaves[int(entry.name)].name)
        else:
            name = f"tangent_{entry.name}"
            bindings[entry.node] = Binding("tangent", name)
            tangents.append(_slot(name, entry.node.meta["val"]))
    results = tuple(
        Result(r.kind, str(r.of) if isinstance(r.of, int) else bindings[r.of.node].name, r.node)
        for r in view.outputs
    )
    passthrough: dict[int, tuple[str, Any]] = {}
    for position, (kind, what) in view.passthrough.items():
        name = leaves[what].name if kind == "input" else what
        passthrough[position] = ("state" if kind == "attr" else kind, name)
    for position, earlier in view.duplicates.items():
        passthrough[position] = ("output", earlier)
    segment = Segment("forward and backward", view.module, bindings, results, "joint")
    return Document(
        "joint",
        _title(program),
        _inputs(program),
        tuple(tangents),
        _state(program, program.specialize(training), view.module),
        (segment,),
        view.num_outputs,
        passthrough=passthrough,
        history=_history(program),
    )


def planned_step(program: Program, training: Mode) -> Any:
    """The `graphopt.runtime.plan.PlannedStep` that serves the example sizes.

    Raises:
        UnsupportedError: The program has no plan, or none for this mode.
    """
    if program.planner is None:
        raise UnsupportedError(
            "this program has no plan", hint="run the pass rematerialize, or give --passes"
        )
    module = program.emit().train(is_training(training))
    if not isinstance(training, bool):
        for path, part in module.named_modules():
            part.training = training.get(path, True)
    inputs = [
        torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device).requires_grad_(
            leaf.requires_grad
        )
        for leaf in program.signature.inputs
    ]
    with torch.set_grad_enabled(is_training(training)):
        runner = program.planner.runner(module, inputs)
    step = getattr(getattr(runner, "func", None), "step", None)
    if step is None:
        raise UnsupportedError(
            "this program has no plan for such a call", hint="it was planned for the other mode"
        )
    return step


def _plan_document(program: Program, training: Mode) -> Document:
    step = planned_step(program, training)
    leaves = program.signature.inputs
    outside: dict[str, Binding] = {}
    for name, operand in step.operands.items():
        is_input = operand.kind == "input"
        label = leaves[int(operand.name)].name if is_input else operand.name
        outside[name] = Binding("input" if is_input else "state", label)
    tangents: dict[str, Slot] = {}
    for position, name in step.tangents.items():
        label = f"tangent_{position}"
        outside[name] = Binding("tangent", label)
        tangents[label] = Slot(label, (), torch.float32)
    segments = tuple(
        _stage_segment(index, stage, step, outside, leaves, tangents)
        for index, stage in enumerate(step.stages)
    )
    passthrough: dict[int, tuple[str, Any]] = {}
    for position, value in step.passthrough.items():
        binding = _of_operand(value, leaves)
        is_known = binding is not None
        passthrough[position] = (binding.kind, binding.name) if is_known else ("constant", value)
    for position, earlier in step.duplicates.items():
        passthrough[position] = ("output", earlier)
    return Document(
        "plan",
        _title(program),
        _inputs(program),
        tuple(tangents.values()),
        _state(program, program.specialize(training), *(s.module for s in segments)),
        segments,
        step.num_outputs,
        passthrough=passthrough,
        history=_history(program),
    )


def _stage_segment(
    index: int, stage: Any, step: Any, outside: Mapping[str, Binding], leaves: Any, tangents: Any
) -> Segment:
    holders = stage.module.graph.find_nodes(op="placeholder")
    bindings = {}
    for node, name in zip(holders, stage.takes, strict=True):
        bindings[node] = outside.get(name, Binding("value", name))
        if bindings[node].kind == "tangent" and "val" in node.meta:
            tangents[bindings[node].name] = _slot(bindings[node].name, node.meta["val"])
    made = dict(zip(stage.gives, _output_values(stage.module), strict=True))
    results = [Result("value", name, node) for name, node in made.items()]
    if index == 0:
        for position, name in step.results.items():
            results.append(Result("output", str(position), made[name]))
            label = f"tangent_{position}"
            if label in tangents and isinstance(made[name], fx.Node) and "val" in made[name].meta:
                tangents[label] = _slot(label, made[name].meta["val"])
    for operand, name in stage.gradients:
        binding = _of_operand(operand, leaves)
        owner = binding.name if binding is not None else operand.name
        results.append(Result("gradient", owner, made.get(name, name)))
    named = ", ".join(r.name for r in results if r.kind == "gradient")
    title = f"backward, stage {index}: {named}" if index else "forward"
    return Segment(
        title, stage.module, bindings, tuple(results), "backward" if index else "forward"
    )


def _of_operand(value: Any, leaves: Any) -> Binding | None:
    kind = getattr(value, "kind", None)
    if kind == "input":
        return Binding("input", leaves[int(value.name)].name)
    return Binding("state", value.name) if kind in ("parameter", "buffer") else None


def _output_values(module: fx.GraphModule) -> list[Any]:
    value = module.graph.output_node().args[0]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _title(program: Program) -> str:
    skeleton = getattr(program.skeleton, "root", program.skeleton)
    for node in program.module.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        for path, cls in stack.values():
            if path == "":
                return _class_name(cls)
    return type(skeleton).__name__


def _class_name(cls: Any) -> str:
    return cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2]


def _history(program: Program) -> tuple[str, ...]:
    return tuple(record.spec or record.name for record in program.history)


def _inputs(program: Program) -> tuple[Slot, ...]:
    return tuple(
        Slot(leaf.name, tuple(leaf.shape), leaf.dtype, leaf.requires_grad)
        for leaf in program.signature.inputs
    )


def _slot(name: str, value: Any) -> Slot:
    return Slot(name, tuple(concrete(size) for size in value.shape), value.dtype)


def _state(program: Program, *modules: fx.GraphModule) -> dict[str, Slot]:
    known = set(program.emit().state_dict(keep_vars=True))
    found: dict[str, Slot] = {}
    for module in modules:
        for path, value in [
            *module.named_parameters(remove_duplicate=False),
            *attributes_of(module),
        ]:
            if not isinstance(value, torch.Tensor) or path in found:
                continue
            constant = None if path in known else value.detach()
            slot = Slot(path, tuple(value.shape), value.dtype, value.requires_grad, constant)
            found[path] = slot
    used = {path for module in modules for path, _ in attributes_of(module)}
    return {path: slot for path, slot in found.items() if path in used or slot.trainable}


def scope_of(node: fx.Node) -> tuple[str, str]:
    """``(path, class name)`` of the innermost module in which a node ran."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return "", ""
    path, cls = entries[-1]
    return str(path), _class_name(cls)


def phase_of(segment: Segment, node: fx.Node) -> str:
    """``forward`` or ``backward``; ``recomputed`` for forward work inside a backward stage."""
    tag = node.meta.get("partitioner_tag")
    if segment.phase == "joint":
        return "backward" if tag == "is_backward" else "forward"
    if segment.phase == "backward" and tag == "is_forward":
        return "recomputed"
    return segment.phase

"""Make a `Document` of a program: its forward graph, its joint graph, or its plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.cost.saved import SavedTable, saved_table
from graphopt.cost.sizes import concrete
from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.inspect.document import (
    Binding,
    Document,
    Mode,
    Result,
    Segment,
    Slot,
    class_name,
    is_training,
)
from graphopt.ir.joint import JointView, joint_view

if TYPE_CHECKING:
    from graphopt.ir.program import Program


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
        records=program.history,
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
        records=program.history,
    )


def planned_step(program: Program, training: Mode) -> Any:
    """The `graphopt.runtime.execute.CompiledStep` that serves the example sizes.

    Raises:
        UnsupportedError: The program has no plan, or none for this mode.
    """
    if program.planner is None:
        raise UnsupportedError(
            "this program has no plan", hint="run the pass rematerialize on it first"
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
    compiled = getattr(runner, "func", None)
    if compiled is None:
        raise UnsupportedError(
            "this program has no plan for such a call", hint="it was planned for the other mode"
        )
    return compiled


def _plan_document(program: Program, training: Mode) -> Document:
    compiled = planned_step(program, training)
    step = compiled.step
    leaves = program.signature.inputs
    _complete(step, program)
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
    views = tuple(
        _view_segment(position, view, step, leaves)
        for position, view in compiled.views.views.items()
    )
    segments = (segments[0], *views, *segments[1:])
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
        compiled.views.count,
        passthrough=passthrough,
        history=_history(program),
        records=program.history,
    )


def _complete(step: Any, program: Program) -> None:
    """Give the placeholders of stages the metadata of what they stand for, where it lacks."""
    root, fakes = program.emit(), program.fake_inputs()
    known = {name: _operand_value(o, root, fakes) for name, o in step.operands.items()}
    for stage in step.stages:
        holders = stage.module.graph.find_nodes(op="placeholder")
        for node, name in zip(holders, stage.takes, strict=True):
            if known.get(name) is not None:
                node.meta.setdefault("val", known[name])
        for name, value in zip(stage.gives, _output_values(stage.module), strict=True):
            known[name] = value.meta.get("val") if isinstance(value, fx.Node) else None
        for position, name in step.tangents.items():  # shaped like the outputs
            known.setdefault(name, known.get(step.results.get(position, "")))


def _operand_value(operand: Any, root: torch.nn.Module, fakes: list[torch.Tensor]) -> Any:
    if operand.kind == "input":
        return fakes[int(operand.name)]
    path, _, name = operand.name.rpartition(".")
    return getattr(root.get_submodule(path), name)


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


def _view_segment(position: int, view: Any, step: Any, leaves: Any) -> Segment:
    """An output that is a view of another value: made from it after the forward stage."""
    if view.base in step.passthrough:
        base = _of_operand(step.passthrough[view.base], leaves)
    else:
        base = Binding("value", step.results[view.base])
    assert base is not None
    sizes = [Binding("input", leaves[i].name) for i in view.sized_by]
    holders = view.module.graph.find_nodes(op="placeholder")
    bindings = dict(zip(holders, [base, *sizes], strict=True))
    result = Result("output", str(position), view.module.graph.output_node().args[0])
    return Segment(f"output {position}, a view", view.module, bindings, (result,), "forward")


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
                return class_name(cls)
    return getattr(skeleton, "_class_name", type(skeleton).__name__)


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

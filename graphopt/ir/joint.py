"""The forward and backward pass of a program as one functional graph.

This is the only file that touches AOTAutograd's private API. A `JointView` is derived data: it is
made from a flat, mode-specialised forward graph, read by planners and views, and thrown away.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._functorch._aot_autograd import descriptors as _desc
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

from graphopt.errors import UnsupportedError
from graphopt.ir.rnn import split_dropout_layers
from graphopt.ir.tokens import drop_tokens

InputKind = Literal["parameter", "buffer", "input", "tangent"]
OutputKind = Literal["output", "mutation", "gradient"]

_FRESH_OUTPUTS = {"non_alias", "unsafe_view_alias", "custom_function_view"}


@dataclass(frozen=True)
class JointInput:
    """One placeholder of the joint graph.

    Attributes:
        node: The placeholder.
        kind: What it stands for.
        name: The FQN of a parameter or buffer, the flat position of an input, or the position of
            the program output that a tangent belongs to (the latter two as decimal text).
        requires_grad: Whether the caller's tensor requires a gradient.
    """

    node: fx.Node
    kind: InputKind
    name: str
    requires_grad: bool = False


@dataclass(frozen=True)
class JointOutput:
    """One result of the joint graph.

    Attributes:
        node: The node computing it, None for a gradient that is always zero.
        kind: A program output, the new value of a mutated input, or a gradient.
        of: Program output position for outputs; otherwise the `JointInput` it belongs to.
    """

    node: fx.Node | None
    kind: OutputKind
    of: JointInput | int


@dataclass(frozen=True)
class JointView:
    """Forward and backward of a program as one functional ATen graph.

    Attributes:
        module: Flat joint graph; placeholders and results as in `inputs` and `outputs`.
        inputs: One entry a placeholder, in order.
        outputs: One entry a result, in order.
        passthrough: Program output position -> what is returned unchanged: `("constant", value)`,
            `("input", flat position)` or `("attr", FQN)`.
        duplicates: Program output position -> earlier position that returns the same value.
        num_outputs: Number of flat program outputs.
        out_requires_grad: Program output positions that carry a gradient in the source model.
    """

    module: fx.GraphModule
    inputs: tuple[JointInput, ...]
    outputs: tuple[JointOutput, ...]
    passthrough: dict[int, Any]
    duplicates: dict[int, int]
    num_outputs: int
    out_requires_grad: frozenset[int]

    @property
    def graph(self) -> fx.Graph:
        """The joint FX graph."""
        return self.module.graph

    @property
    def written(self) -> set[fx.Node]:
        """The placeholders that the step gives a new value."""
        return {o.of.node for o in self.outputs_of("mutation") if isinstance(o.of, JointInput)}

    def copy(self) -> JointView:
        """The same view over a graph of its own, with the same names."""
        graph, nodes = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(self.graph, nodes))
        graph.output_node().meta = dict(self.graph.output_node().meta)
        inputs = {i: replace(i, node=nodes[i.node]) for i in self.inputs}
        outputs = [
            replace(
                o,
                node=nodes[o.node] if o.node is not None else None,
                of=inputs[o.of] if isinstance(o.of, JointInput) else o.of,
            )
            for o in self.outputs
        ]
        module = fx.GraphModule(self.module, graph)
        return replace(self, module=module, inputs=tuple(inputs.values()), outputs=tuple(outputs))

    def inputs_of(self, kind: InputKind) -> list[JointInput]:
        """The placeholders of one kind, in order."""
        return [i for i in self.inputs if i.kind == kind]

    def outputs_of(self, kind: OutputKind) -> list[JointOutput]:
        """The results of one kind, in order."""
        return [o for o in self.outputs if o.kind == kind]


@dataclass(frozen=True)
class _Results:
    """The flat program outputs that the joint graph has to compute, and those it need not."""

    computed: list[int]
    passthrough: dict[int, Any]
    duplicates: dict[int, int]


def joint_view(
    module: fx.GraphModule,
    fake_inputs: Sequence[Any],
    *,
    differentiable: Iterable[int] | None = None,
    grad: bool = True,
) -> JointView:
    """Derives the joint graph of a flat forward module.

    Args:
        module: Flat pre-dispatch graph (placeholders are tensors, one flat tuple is returned),
            already specialised to train or eval mode. Its parameters' `requires_grad` count.
        fake_inputs: One fake tensor a placeholder, symbolic where the program is; their
            `requires_grad` counts.
        differentiable: Positions of the flat outputs that receive a gradient; None: all that can.
        grad: False: the forward pass alone, as under `torch.no_grad`.

    Returns:
        The joint view. If nothing requires a gradient it has no tangents and no gradients.

    Raises:
        UnsupportedError: A differentiable input is mutated, inputs alias each other under
            mutation, or the graph cannot be traced through autograd.
    """
    wanted = None if differentiable is None else frozenset(differentiable)
    carrying = _carrying_gradient(module, fake_inputs, wanted) if grad else frozenset()
    clones: frozenset[int] = frozenset()
    while True:
        staged, results = _stage(module, wanted, clones)
        joint = _trace(staged, tuple(fake_inputs), grad)
        aliases = _differentiable_aliases(joint, results)
        if aliases <= clones:
            return _describe(joint, results, carrying)
        clones |= aliases


def _carrying_gradient(
    module: fx.GraphModule, fake_inputs: Sequence[Any], wanted: frozenset[int] | None
) -> frozenset[int]:
    """Positions of the outputs that the traced graph detaches but the model does not."""
    output = module.graph.output_node()
    others = [
        position
        for position, value in enumerate(output.args[0])  # type: ignore[arg-type]
        if wanted is not None and position not in wanted and _is_floating(value)
    ]
    if not others:
        return frozenset()
    mode = next(t.fake_mode for t in fake_inputs)
    tensors = {
        name: mode.from_tensor(tensor, static_shapes=True)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    with mode, torch.enable_grad(), enable_python_dispatcher():
        outputs = torch.func.functional_call(module, tensors, tuple(fake_inputs))
    return frozenset(position for position in others if outputs[position].requires_grad)


def _is_floating(value: Any) -> bool:
    fake = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(fake, torch.Tensor) and (fake.is_floating_point() or fake.is_complex())


def _stage(
    module: fx.GraphModule, wanted: frozenset[int] | None, clones: frozenset[int]
) -> tuple[fx.GraphModule, _Results]:
    """Copies the graph, keeping only computed outputs; detaches those without a gradient.

    Outputs in `clones` are copied, so that autograd sees a fresh tensor instead of an alias, whose
    gradient AOTAutograd would route around the graph.
    """
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, copied)
    source = module.graph.output_node()
    placeholders = module.graph.find_nodes(op="placeholder")
    computed, passthrough, duplicates, first = [], {}, {}, {}
    values = []
    for position, value in enumerate(source.args[0]):  # type: ignore[arg-type]
        if not isinstance(value, fx.Node):
            passthrough[position] = ("constant", value)
        elif value.op == "placeholder":
            passthrough[position] = ("input", placeholders.index(value))
        elif value.op == "get_attr":
            passthrough[position] = ("attr", value.target)
        elif value in first:
            duplicates[position] = first[value]
        else:
            first[value] = position
            computed.append(position)
            values.append(_staged_output(graph, copied[value], position, wanted, clones))
    graph.output(tuple(values))
    split_dropout_layers(graph)
    return fx.GraphModule(module, graph), _Results(computed, passthrough, duplicates)


def _staged_output(
    graph: fx.Graph,
    value: fx.Node,
    position: int,
    wanted: frozenset[int] | None,
    clones: frozenset[int],
) -> fx.Node:
    if isinstance(value.meta.get("val"), torch.SymInt | int | float | bool | torch.SymFloat):
        return value
    if wanted is not None and position not in wanted:
        return graph.call_function(torch.ops.aten.detach.default, (value,))
    if position in clones:
        return graph.call_function(torch.ops.aten.clone.default, (value,))
    return value


def _trace(module: fx.GraphModule, fake_inputs: tuple[Any, ...], grad: bool) -> Any:
    """Runs AOTAutograd; global state is as before afterwards, whatever happens."""
    grad_enabled = torch.is_grad_enabled()
    try:
        with contextlib.ExitStack() as stack, torch.set_grad_enabled(grad):
            return aot_export_joint_with_descriptors(stack, module, fake_inputs)
    except Exception as error:
        raise UnsupportedError(
            f"The forward and backward pass cannot be traced as one graph: {_first_line(error)}",
            hint="Data-dependent shapes and in-place writes to differentiable inputs are the usual "
            "causes; keep such a part outside of the optimised module.",
        ) from error
    finally:
        torch.set_grad_enabled(grad_enabled)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


def _differentiable_aliases(joint: Any, results: _Results) -> frozenset[int]:
    infos = joint._aot_state.fw_metadata.output_info
    return frozenset(
        position
        for position, info in zip(results.computed, infos, strict=True)
        if info.requires_grad and info.output_type.name not in _FRESH_OUTPUTS
    )


def _is_token(desc: Any) -> bool:
    return isinstance(desc, _desc.ForwardTokenAOTInput | _desc.ForwardTokenAOTOutput)


def _describe(joint: Any, results: _Results, carrying: frozenset[int]) -> JointView:
    module: fx.GraphModule = joint.graph_module
    drop_tokens(module.graph, _is_token)
    metadata = joint._aot_state.fw_metadata
    flags = [info.requires_grad for info in metadata.input_info]
    inputs: dict[Any, JointInput] = {}
    for position, node in enumerate(module.graph.find_nodes(op="placeholder")):
        requires_grad = position < len(flags) and flags[position]
        inputs[node.meta["desc"]] = _joint_input(node, results, requires_grad)
    output_node = module.graph.output_node()
    outputs = [
        described
        for node, desc in zip(output_node.args[0], output_node.meta["desc"], strict=True)  # type: ignore[arg-type]
        if (described := _joint_output(node, desc, inputs, results)) is not None
    ]
    for info, described in zip(metadata.input_info, inputs.values(), strict=False):
        if info.mutates_data and info.requires_grad:
            raise UnsupportedError(
                f"The model writes in place to {described.kind} '{described.name}', which requires "
                "a gradient.",
                hint="Clone it before the write.",
            )
    return JointView(
        module=module,
        inputs=tuple(inputs.values()),
        outputs=tuple(outputs),
        passthrough=results.passthrough,
        duplicates=results.duplicates,
        num_outputs=len(results.computed) + len(results.passthrough) + len(results.duplicates),
        out_requires_grad=frozenset(
            position
            for position, info in zip(results.computed, metadata.output_info, strict=True)
            if info.requires_grad
        )
        | carrying,
    )


def _joint_input(node: fx.Node, results: _Results, requires_grad: bool) -> JointInput:
    desc = node.meta["desc"]
    if isinstance(desc, _desc.ParamAOTInput):
        return JointInput(node, "parameter", desc.target, requires_grad)
    if isinstance(desc, _desc.BufferAOTInput):
        return JointInput(node, "buffer", desc.target, requires_grad)
    if isinstance(desc, _desc.PlainAOTInput):
        return JointInput(node, "input", str(desc.idx), requires_grad)
    if isinstance(desc, _desc.TangentAOTInput) and isinstance(desc.output, _desc.PlainAOTOutput):
        return JointInput(node, "tangent", str(results.computed[desc.output.idx]))
    raise UnsupportedError(
        f"The joint graph takes {desc}, which graphopt cannot supply.",
        hint="Inputs that alias each other and are written to are the usual cause: clone one.",
    )


def _joint_output(
    node: Any, desc: Any, inputs: dict[Any, JointInput], results: _Results
) -> JointOutput | None:
    value = node if isinstance(node, fx.Node) else None
    if isinstance(desc, _desc.PlainAOTOutput):
        return JointOutput(value, "output", results.computed[desc.idx])
    if isinstance(desc, _desc.InputMutationAOTOutput):
        return JointOutput(value, "mutation", inputs[desc.mutated_input])
    if isinstance(desc, _desc.GradAOTOutput):
        owner = inputs.get(desc.grad_of)
        return JointOutput(value, "gradient", owner) if owner is not None else None
    if value is None or isinstance(desc, _desc.IntermediateBaseAOTOutput):
        return None  # the absent gradient of an integer input; the base of an alias
    raise UnsupportedError(f"The joint graph returns {desc}, which graphopt cannot hand over.")

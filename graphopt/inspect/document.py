"""What a dump shows: a program, its joint graph, or its plan, in one form for all printers.

A `Document` is a list of segments (flat FX graphs) that share one space of names: a program and a
joint graph have one segment, a plan has one for the forward pass and one for each piece of the
backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from graphopt.cost.saved import SavedTable
from graphopt.ir.program import PassRecord

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
        records: The same with what they report.
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
    records: tuple[PassRecord, ...] = ()


def is_training(mode: Mode) -> bool:
    """Whether a mode is that of a training step: the model's own flag counts."""
    return mode if isinstance(mode, bool) else mode.get("", True)


def class_name(cls: Any) -> str:
    """Name of a class, given itself or as dotted text."""
    return cls.__name__ if isinstance(cls, type) else str(cls).rpartition(".")[2]


def scope_of(node: fx.Node) -> tuple[str, str]:
    """``(path, class name)`` of the innermost module in which a node ran."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    entries = list(stack.values())
    if not entries:
        return "", ""
    path, cls = entries[-1]
    return str(path), class_name(cls)


def phase_of(segment: Segment, node: fx.Node) -> str:
    """``forward`` or ``backward``; ``recomputed`` for forward work inside a backward stage."""
    tag = node.meta.get("partitioner_tag")
    if segment.phase == "joint":
        return "backward" if tag == "is_backward" else "forward"
    if segment.phase == "backward" and tag == "is_forward":
        return "recomputed"
    return segment.phase

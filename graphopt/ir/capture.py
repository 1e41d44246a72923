"""Capture: trace a model in its modes, and find out what follows the mode, dtype and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import CaptureError, ModelError
from graphopt.ir import literals, mode
from graphopt.ir import signature as signatures
from graphopt.ir.align import all_graphs
from graphopt.ir.graphs import bind_graph
from graphopt.ir.program import Program
from graphopt.ir.signature import Signature
from graphopt.ir.skeleton import Skeleton, build
from graphopt.ir.trace import Trace, trace
from graphopt.ir.trees import same_tree
from graphopt.ir.untouched import ordinary, untouched


def capture(
    model: nn.Module,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = "batch",
    training: bool = True,
) -> Program:
    """Capture a model as a graph.

    The model is traced on fake tensors in training mode.  It is left as it was (its mode,
    gradients, buffers, attributes, the random state), and so is every global mode.  The program
    shares its parameters and buffers; deep-copy the model first to keep it apart.

    Args:
        model: The model; an `OptimizedModule` gives its stored program and isn't traced again.
        args: Example positional arguments (a single tensor stands for a tuple of it).
        kwargs: Example keyword arguments.
        dynamic: Which sizes stay free: ``"batch"`` (dimension 0 of every tensor),
            ``"batch,sequence"`` (dimensions 0 and 1), ``None``, or torch's own ``dynamic_shapes``.
        training: Without, the model is traced in eval mode alone, and the program is that in
            either mode: for what never trains, of a model that can't be traced in training mode.

    Returns:
        The program.

    Raises:
        CaptureError: The model can't be captured; says what failed, at which line of the user's
            code, and what to try.
        InputMismatch: The example inputs don't fit ``model.forward``.
    """
    from graphopt.ir.module import OptimizedModule

    if isinstance(model, OptimizedModule):
        return model.program
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    _refuse_inference_tensors(model)
    _refuse_names(model)
    signature, flat = signatures.bind(model, args, dict(kwargs or {}))
    with untouched(model):
        return _capture(model, signature, [ordinary(tensor) for tensor in flat], dynamic, training)


def _refuse_inference_tensors(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_inference():
            raise ModelError(
                f"{name} was made in torch.inference_mode, and autograd takes no such tensor",
                hint="make the model outside of inference_mode, or copy.deepcopy it there",
            )


def _refuse_names(model: nn.Module) -> None:
    """What is captured hangs on graph modules under the source's names, some of which are taken."""
    from graphopt.ir.module import OptimizedModule

    taken = {*dir(fx.GraphModule), *dir(OptimizedModule), "meta"} - {*dir(nn.Module)}
    own = (*model._parameters, *model._buffers, *model._modules)
    clash = next((name for name in own if name in taken), None)
    if clash is not None:
        raise CaptureError(
            f"{type(model).__name__}.{clash} has a name that an optimised module needs for itself",
            hint="rename it, or wrap the model in a module of its own: torch.nn.Sequential(model)",
        )


def _capture(
    model: nn.Module,
    signature: Signature,
    flat: list[torch.Tensor],
    dynamic: Any,
    training: bool,
) -> Program:
    flags = {each: overridden_flags(model, each) for each in (True, False)}
    skeleton = build(model, flags)
    train, dynamic = _first_trace(model, signature, flat, dynamic, training)
    session = _Session(model, flat, dynamic, skeleton)
    if not training:
        module = bind_graph(train.graph, skeleton.root)
        found = session.tie(train, training=False)
        return Program(module, None, train.signature, skeleton, literals=found)
    if session.find_all(train):
        module = bind_graph(train.graph, skeleton.root)
        return Program(module, None, train.signature, skeleton, literals=literals.Literals())
    evaluated = trace(model, signature, flat, dynamic, training=False)
    branches = mode.find_switches(train.graph, evaluated.graph)
    if not branches and not _same_outputs(train, evaluated):
        branches = ("",)
    module = bind_graph(train.graph, skeleton.root)
    if not branches:
        found = session.tie(train, training=True)
        return Program(module, None, train.signature, skeleton, literals=found)
    found = session.tie(train, training=True).also(session.tie(evaluated, training=False))
    return Program(
        module,
        bind_graph(evaluated.graph, skeleton.root),
        train.signature,
        skeleton,
        literals=found,
        branches=branches,
        eval_signature=evaluated.signature,
    )


def _first_trace(
    model: nn.Module,
    signature: Signature,
    flat: list[torch.Tensor],
    dynamic: Any,
    training: bool,
) -> tuple[Trace, Any]:
    """Trace in one mode; a model that can't be traced with free sizes keeps the example's."""
    try:
        return trace(model, signature, flat, dynamic, training=training), dynamic
    except CaptureError as error:
        if not isinstance(dynamic, str):
            raise
        try:
            return trace(model, signature, flat, None, training=training), None
        except CaptureError:
            raise error from error.__cause__


def _same_outputs(one: Trace, other: Trace) -> bool:
    return same_tree(one.signature.out_spec, other.signature.out_spec)


class _Session:
    """Finds out which literals follow the model, by tracing moved copies of it."""

    def __init__(
        self, model: nn.Module, flat: list[torch.Tensor], dynamic: Any, skeleton: Skeleton
    ) -> None:
        self.model = model
        self.flat = flat
        self.dynamic = dynamic
        self.root = skeleton.root
        self.on_meta: dict[bool, Trace | str] = {}

    def moved(self, known: Trace, *, meta: bool, training: bool) -> Trace | str:
        """The trace of a copy in another dtype (and on the meta device), or why there is none."""
        if meta and training in self.on_meta:
            return self.on_meta[training]
        result: Trace | str
        try:
            copied = literals.variant(self.model, self.flat, meta=meta)
            with untouched(copied.model):
                result = trace(
                    copied.model, known.signature, copied.inputs, self.dynamic, training=training
                )
        except CaptureError as error:
            result = error.message
        except Exception as error:  # a model whose deepcopy fails
            result = f"the model can't be copied to find out ({error})"
        if meta:
            self.on_meta[training] = result
        return result

    def find_all(self, train: Trace) -> bool:
        """Find switches and ties with one more trace, in eval mode, another dtype and device.

        That succeeds where the traces differ in literals only; else nothing is noted.
        """
        if not any(literals.needed(train.graph)):
            return False
        other = self.moved(train, meta=True, training=False)
        if isinstance(other, str) or not _same_outputs(train, other):
            return False
        found = literals.tie(train.graph, other.graph, self.root, meta=True, modes=True)
        if found == literals.Literals():
            return True
        _forget(train.graph)
        return False

    def tie(self, known: Trace, *, training: bool) -> literals.Literals:
        """Tie the literals of a trace in one mode."""
        needs = literals.needed(known.graph)
        if not any(needs):
            return literals.Literals()
        on_meta = self.moved(known, meta=True, training=training) if needs[1] else "not needed"
        if isinstance(on_meta, Trace):
            found = literals.tie(known.graph, on_meta.graph, self.root, meta=True)
            if found == literals.Literals():
                return found
        moved = self.moved(known, meta=False, training=training)
        if isinstance(moved, str):
            return literals.Literals(moved, moved)
        found = literals.tie(known.graph, moved.graph, self.root, meta=False)
        device: str | None = None
        if isinstance(on_meta, Trace):
            device = literals.tie_devices(known.graph, on_meta.graph, self.root)
        elif needs[1]:
            device = on_meta
        return literals.Literals(found.dtype, device)


def _forget(module: fx.GraphModule) -> None:
    """Drop what an attempt to find switches and ties has noted."""
    for inner in all_graphs(module):
        for node in inner.graph.nodes:
            node.meta.pop("mode", None)
            node.meta.pop("ties", None)


def overridden_flags(model: nn.Module, training: bool) -> dict[str, bool]:
    """The modes that deviate after ``model.train(training)``, where that is overridden."""
    if all(type(m).train is nn.Module.train for m in model.modules()):
        return {}
    before = [(m, m.training) for m in model.modules()]
    try:
        model.train(training)
        return {name: m.training for name, m in model.named_modules() if m.training != training}
    finally:
        for module, flag in before:
            module.training = flag

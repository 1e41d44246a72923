"""Capture: trace a model in its modes, and find out what follows the mode, dtype and device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from graphopt.ir.stand_ins import resized, stand_ins
from graphopt.ir.trace import Trace, is_forward_only, trace
from graphopt.ir.trees import same_tree
from graphopt.ir.untouched import ordinary, untouched


def capture(
    model: nn.Module,
    args: Sequence[Any] | torch.Tensor = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = "batch",
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
    if isinstance(model, torch.jit.ScriptModule):
        raise CaptureError(
            f"{type(model).__name__} was compiled by TorchScript, which can't be captured",
            hint="give the model that was scripted or traced",
        )
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    _refuse_inference_tensors(model)
    _refuse_names(model)
    signature, flat = signatures.bind(model, args, dict(kwargs or {}))
    with untouched(model):
        return _capture(model, signature, [ordinary(tensor) for tensor in flat], dynamic)


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
    model: nn.Module, signature: Signature, flat: list[torch.Tensor], dynamic: Any
) -> Program:
    flags = {training: overridden_flags(model, training) for training in (True, False)}
    skeleton = build(model, flags)
    try:
        train, dynamic = _first_trace(model, signature, flat, dynamic, training=True)
    except CaptureError:
        if not is_forward_only():
            raise
        return _evaluated(model, signature, flat, dynamic, skeleton)
    session = _Session(model, flat, dynamic, skeleton)
    found = session.find_all(train)
    if found is not None:
        module = bind_graph(train.graph, skeleton.root)
        return Program(module, None, train.signature, skeleton, literals=found)
    evaluated = trace(model, signature, flat, dynamic, training=False)
    branches = mode.find_switches(train.graph, evaluated.graph)
    if not branches and not _same_outputs(train, evaluated):
        branches = ("",)
    module = bind_graph(train.graph, skeleton.root)
    if not branches:
        session.fixed = False  # it wasn't the mode for which a trace without free sizes failed
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


def _evaluated(
    model: nn.Module,
    signature: Signature,
    flat: list[torch.Tensor],
    dynamic: Any,
    skeleton: Skeleton,
) -> Program:
    """A program that holds what the model is in eval mode alone.

    Layers that are left out at random in training, say, can't be captured.
    """
    evaluated, dynamic = _first_trace(model, signature, flat, dynamic, training=False)
    found = _Session(model, flat, dynamic, skeleton).tie(evaluated, training=False)
    module = bind_graph(evaluated.graph, skeleton.root)
    return Program(module, None, evaluated.signature, skeleton, literals=found)


def _first_trace(
    model: nn.Module,
    signature: Signature,
    flat: list[torch.Tensor],
    dynamic: Any,
    *,
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
    """Finds out which literals follow the model, by tracing moved copies of it.

    Such traces have no free sizes at first (see `graphopt.ir.stand_ins`), and have the model's
    where that leads to nothing.
    """

    def __init__(
        self, model: nn.Module, flat: list[torch.Tensor], dynamic: Any, skeleton: Skeleton
    ) -> None:
        self.model = model
        self.flat = flat
        self.dynamic = dynamic
        self.root = skeleton.root
        self.fixed = True  # whether traces without free sizes may lead to something
        self.on_meta: dict[tuple[bool, bool], Trace | str] = {}

    def moved(self, known: Trace, *, meta: bool, training: bool, fixed: bool) -> Trace | str:
        """The trace of a copy in another dtype (and on the meta device), or why there is none.

        Args:
            known: The trace that it is compared with.
            meta: Whether the copy is on the meta device.
            training: The copy's mode.
            fixed: Whether the trace has no free sizes.
        """
        key = (training, fixed)
        if meta and key in self.on_meta:
            return self.on_meta[key]
        result: Trace | str
        try:
            result = self._trace(known, meta, training, fixed)
        except CaptureError as error:
            result = error.message
        except Exception as error:  # a model whose deepcopy fails
            result = f"the model can't be copied to find out ({error})"
        if meta:
            self.on_meta[key] = result
        return result

    def _trace(self, known: Trace, meta: bool, training: bool, fixed: bool) -> Trace:
        flat, dynamic, sizes = self.flat, self.dynamic, None
        if fixed:
            sizes = stand_ins(known.graph, self.model)
            flat, dynamic = resized(flat, known.graph, sizes, meta=meta), None
        copied = literals.variant(self.model, flat, meta=meta)
        with untouched(copied.model):
            found = trace(copied.model, known.signature, copied.inputs, dynamic, training=training)
        return replace(found, sizes=sizes)

    def find_all(self, train: Trace) -> literals.Literals | None:
        """Find switches and ties with one more trace, in eval mode, another dtype and device.

        That succeeds where the traces differ in literals only; else nothing is noted.  Where that
        is because some calls are recorded otherwise on the meta device, there is one more trace.
        """
        needs = literals.needed(train.graph)
        self.fixed = bool(stand_ins(train.graph, self.model))
        if not any(needs) and not self.fixed:
            return None  # a trace of the model itself takes no longer
        other = self.moved(train, meta=True, training=False, fixed=self.fixed)
        if isinstance(other, str):
            return None
        if self._ties(train, other, meta=True, modes=True) == literals.Literals():
            return literals.Literals()
        _forget(train.graph)
        if not literals.recorded_otherwise(train.graph, other.graph):
            return None
        here = self.moved(train, meta=False, training=False, fixed=self.fixed)
        if isinstance(here, str) or self._ties(train, here, meta=False, modes=True).dtype:
            _forget(train.graph)
            return None
        if needs[1] and literals.tie_devices(train.graph, other.graph, self.root, other.sizes):
            _forget(train.graph)
            return None
        return literals.Literals()

    def _ties(
        self, known: Trace, other: Trace, *, meta: bool, modes: bool = False
    ) -> literals.Literals:
        if modes and not _same_outputs(known, other):
            return literals.Literals("other outputs", "other outputs")
        return literals.tie(
            known.graph, other.graph, self.root, meta=meta, modes=modes, sizes=other.sizes
        )

    def tie(self, known: Trace, *, training: bool) -> literals.Literals:
        """Tie the literals of a trace in one mode."""
        needs = literals.needed(known.graph)
        if not any(needs):
            return literals.Literals()
        found = literals.Literals()
        fixed_first = self.fixed and stand_ins(known.graph, self.model)
        for fixed in (True, False) if fixed_first else (False,):
            _forget(known.graph, "ties")
            found = self._tie(known, needs[1], training, fixed)
            if found == literals.Literals():
                break
        return found

    def _tie(self, known: Trace, devices: bool, training: bool, fixed: bool) -> literals.Literals:
        on_meta: Trace | str = "not needed"
        if devices or (training, fixed) in self.on_meta:
            on_meta = self.moved(known, meta=True, training=training, fixed=fixed)
        if isinstance(on_meta, Trace):
            found = self._ties(known, on_meta, meta=True)
            if found == literals.Literals():
                return found
        moved = self.moved(known, meta=False, training=training, fixed=fixed)
        if isinstance(moved, str):
            return literals.Literals(moved, moved)
        found = self._ties(known, moved, meta=False)
        device: str | None = None
        if devices and isinstance(on_meta, Trace):
            device = literals.tie_devices(known.graph, on_meta.graph, self.root, on_meta.sizes)
        elif devices:
            device = str(on_meta)
        return literals.Literals(found.dtype, device)


def _forget(module: fx.GraphModule, *notes: str) -> None:
    """Drop what an attempt to find switches and ties has noted."""
    for inner in all_graphs(module):
        for node in inner.graph.nodes:
            for note in notes or ("mode", "ties"):
                node.meta.pop(note, None)


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

"""The loss of a step: which one it is, and what it keeps, allocates and hands to backward."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.cost.allocator import trace_memory
from graphopt.cost.calls import TensorSpec
from graphopt.cost.sizes import Substitution, concrete
from graphopt.errors import (
    GraphoptError,
    ModelError,
    NothingToTrainError,
    UsageError,
    first_line,
    user_line_of_error,
)
from graphopt.ir.randomness import kept_random_state
from graphopt.ir.trees import flatten
from graphopt.ir.untouched import autocast_off

Loss = Callable[[Any], torch.Tensor]


@dataclass(frozen=True)
class Tangent:
    """The gradient that a loss hands back for one output.

    Attributes:
        shape: Its shape, the output's.
        stride: Its strides; zeros where it is expanded, as from a sum.
        bytes: Bytes of its storage; 0 where it shares that of an earlier tangent.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class LossMeasurement:
    """Bytes of a loss and its backward, above what is live before it: the outputs.

    Attributes:
        kept: Live between forward and backward: the loss itself and what it saved, without the
            outputs.
        forward_peak: Most live bytes while the loss is computed.
        backward_peak: Most live bytes during its backward, ``kept`` and tangents included;
            negative where outputs that nobody holds go.
        tangent_bytes: Bytes of the tangents' storages.
        tangents: For each leaf of the outputs its tangent; None for a leaf without one.
        saves: For each leaf whether the loss saves it (or a view of it) for its backward.
        output_bytes: Bytes of the outputs.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    tangent_bytes: int
    tangents: tuple[Tangent | None, ...]
    saves: tuple[bool, ...]
    output_bytes: int


def default_loss(outputs: Any) -> torch.Tensor:
    """The model's own scalar loss if its outputs have one, else the sum of all floating outputs.

    The model's own loss is the attribute or key ``loss``, or the one tensor that the outputs
    consist of if that is a floating scalar.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, torch.Tensor) and own.ndim == 0:
        return own
    tensors = flatten(outputs)[0]
    if len(tensors) == 1 and tensors[0].ndim == 0 and tensors[0].is_floating_point():
        return tensors[0]
    floating = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if not floating:
        raise NothingToTrainError(
            "the model has no floating output to take a loss of",
            hint="pass loss=..., or measure the forward pass alone",
        )
    sums = [t.real.sum() if t.is_complex() else t.sum() for t in floating]
    total = sums[0]
    for one in sums[1:]:
        total = total + one
    return total


def loss_value(loss: Loss | None, outputs: Any) -> torch.Tensor:
    """Apply a loss (default: `default_loss`) and check that it can be differentiated.

    Raises:
        ModelError: The loss itself raises.
        UsageError: It is no scalar tensor.
        NothingToTrainError: It depends on nothing that requires a gradient.
    """
    value = default_loss(outputs) if loss is None else applied(loss, outputs)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise UsageError(
            f"the loss must be one number, but it is {shape}",
            hint="end it with .mean() or .sum()",
        )
    if not value.requires_grad:
        raise NothingToTrainError(
            "the loss depends on nothing that requires a gradient",
            hint="give some parameter or input requires_grad, or put the model in eval mode",
        )
    return value


def applied(loss: Callable[..., Any], outputs: Any, *targets: Any) -> Any:
    """The loss of outputs, and of targets where it takes them.

    Raises:
        ModelError: It fails.
    """
    try:
        return loss(outputs, *targets)
    except GraphoptError:
        raise
    except Exception as error:  # user code may raise anything
        raise ModelError(
            f"the loss fails on the model's outputs: {type(error).__name__}: {first_line(error)}",
            user_line=user_line_of_error(error),
            hint="call it on what the model returns for the example inputs",
        ) from error


def measure_loss(
    outputs_like: Any,
    loss: Loss | None = None,
    *,
    symbols: Substitution | None = None,
    held: Collection[int] | None = None,
) -> LossMeasurement:
    """Measure a loss by itself, on outputs that look like the given ones.

    Args:
        outputs_like: Pytree of the model's outputs, real or fake tensors; only shapes, strides,
            types and devices matter.  Where at least one tensor requires a gradient, exactly those
            get one; else all floating ones do.
        loss: ``loss(outputs)``; default: `default_loss`.
        symbols: What stands for symbolic sizes; default: the hints.
        held: Leaves that stay alive during backward; the others go as soon as the loss is
            computed, unless it saved them.  Default: all.

    Returns:
        The measurement, after one warm-up.
    """
    leaves, spec = pytree.tree_flatten(outputs_like)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    explicit = any(t.requires_grad for t in tensors)
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))
    held = range(len(leaves)) if held is None else held
    outputs = _Outputs([_stand_in(leaf, explicit, symbols) for leaf in leaves], spec, loss)
    with kept_random_state():
        outputs.run(held, lambda name: None)
        saves = outputs.saved_leaves()
        trace = trace_memory(lambda mark: outputs.run(held, mark), device=device)
    tangents: tuple[Tangent | None, ...] = trace.result
    before = trace.live_at("outputs")
    return LossMeasurement(
        kept=trace.live_at("loss") - before,
        forward_peak=trace.peak_between("outputs", "loss") - before,
        backward_peak=trace.peak_between("backward", None) - before,
        tangent_bytes=sum(t.bytes for t in tangents if t is not None),
        tangents=tangents,
        saves=saves,
        output_bytes=before,
    )


@dataclass(frozen=True)
class _StandIn:
    """What stands for one tensor among the outputs."""

    spec: TensorSpec
    differentiable: bool


class _Outputs:
    """Stand-ins for a module's outputs, made anew for each run, and a loss of them."""

    def __init__(self, leaves: list[Any], spec: Any, loss: Loss | None) -> None:
        self.leaves, self.spec, self.loss = leaves, spec, loss
        self.wanted = [
            i for i, leaf in enumerate(leaves) if isinstance(leaf, _StandIn) and leaf.differentiable
        ]
        self.token = torch.zeros((), requires_grad=True)

    def run(self, held: Collection[int], mark: Callable[[str], None]) -> tuple[Any, ...]:
        """One loss and its backward; returns descriptions of the tangents."""
        tangents: list[torch.Tensor | None] = []
        leaves = self._made(tangents)
        mark("outputs")
        value = self._value(leaves)
        mark("loss")
        leaves = [leaf if i in held else None for i, leaf in enumerate(leaves)]
        mark("backward")
        with autocast_off():
            value.backward()
        # Only descriptions leave: the profiler would mistake what is freed after its session.
        return _tangents(len(leaves), self.wanted, tangents)

    def saved_leaves(self) -> tuple[bool, ...]:
        """For each leaf whether the loss saves it."""
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen.add(tensor.untyped_storage()._cdata)
            return tensor

        leaves = self._made([])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = self._value(leaves)
        del value
        return tuple(
            isinstance(t, torch.Tensor) and t.untyped_storage()._cdata in seen for t in leaves
        )

    def _value(self, leaves: list[Any]) -> torch.Tensor:
        with torch.enable_grad():
            value = loss_value(self.loss, pytree.tree_unflatten(leaves, self.spec))
        torch.clear_autocast_cache()
        return value

    def _made(self, tangents: list[torch.Tensor | None]) -> list[Any]:
        specs = [self.leaves[i].spec for i in self.wanted]
        with torch.enable_grad():
            made = _Made.apply(self.token, specs, tangents) if specs else ()
        wanted = dict(zip(self.wanted, made, strict=True))
        return [
            wanted[i] if i in wanted else leaf.spec.build() if isinstance(leaf, _StandIn) else leaf
            for i, leaf in enumerate(self.leaves)
        ]


def _stand_in(value: Any, explicit: bool, symbols: Substitution | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape = tuple(concrete(size, symbols) for size in value.shape)
    stride = tuple(concrete(size, symbols) for size in value.stride())
    wants = value.requires_grad if explicit else value.is_floating_point() or value.is_complex()
    return _StandIn(TensorSpec(0, shape, stride, value.dtype, value.device), wants)


class _Made(torch.autograd.Function):
    """Makes the stand-ins; takes their gradients, as a planned step does."""

    @staticmethod
    def forward(
        ctx: Any, token: torch.Tensor, specs: list[TensorSpec], tangents: list[Any]
    ) -> tuple[torch.Tensor, ...]:
        ctx.tangents = tangents
        ctx.set_materialize_grads(False)
        return tuple(spec.build() for spec in specs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        ctx.tangents.extend(grads)
        return None, None, None


def _tangents(
    count: int, differentiable: list[int], grads: Sequence[torch.Tensor | None]
) -> tuple[Tangent | None, ...]:
    found: list[Tangent | None] = [None] * count
    seen: set[int] = set()
    for index, grad in zip(differentiable, grads, strict=True):
        if grad is None:
            continue
        storage = grad.untyped_storage()
        size = 0 if storage._cdata in seen else storage.nbytes()
        seen.add(storage._cdata)
        found[index] = Tangent(tuple(grad.shape), tuple(grad.stride()), size)
    return tuple(found)

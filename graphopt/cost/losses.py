"""The loss of a step: which one it is, and what it keeps, allocates and hands to backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.cost.allocator import trace_memory
from graphopt.cost.calls import TensorSpec
from graphopt.cost.preserve import autocast_off
from graphopt.cost.sizes import Substitution, concrete
from graphopt.errors import NothingToTrainError

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
    """Bytes of a loss and its backward, above what is live before it (the outputs included).

    Attributes:
        kept: Live between forward and backward: the loss itself and what it saved, without the
            outputs.
        forward_peak: Most live bytes while the loss is computed.
        backward_peak: Most live bytes during its backward, ``kept`` included.
        tangent_bytes: Bytes of the tangents' storages.
        tangents: For each leaf of the outputs its tangent; None for a leaf without one.
        saves: For each leaf whether the loss saves it (or a view of it) for its backward.
    """

    kept: int
    forward_peak: int
    backward_peak: int
    tangent_bytes: int
    tangents: tuple[Tangent | None, ...]
    saves: tuple[bool, ...]


def default_loss(outputs: Any) -> torch.Tensor:
    """The model's own scalar loss if its outputs have one, else the sum of all floating outputs.

    The model's own loss is the attribute or key ``loss``, or the one tensor that the outputs
    consist of if that is a floating scalar.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, torch.Tensor) and own.ndim == 0:
        return own
    tensors = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
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
        NothingToTrainError: It is no scalar tensor that requires a gradient.
    """
    value = default_loss(outputs) if loss is None else loss(outputs)
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise NothingToTrainError(f"the loss must be one number, but it is {shape}")
    if not value.requires_grad:
        raise NothingToTrainError(
            "the loss depends on nothing that requires a gradient",
            hint="give some parameter or input requires_grad, or put the model in eval mode",
        )
    return value


def measure_loss(
    outputs_like: Any, loss: Loss | None = None, *, symbols: Substitution | None = None
) -> LossMeasurement:
    """Measure a loss by itself, on outputs that look like the given ones.

    Args:
        outputs_like: Pytree of the model's outputs, real or fake tensors; only shapes, strides,
            types and devices matter.  Where at least one tensor requires a gradient, exactly those
            get one; else all floating ones do.
        loss: ``loss(outputs)``; default: `default_loss`.
        symbols: What stands for symbolic sizes; default: the hints.

    Returns:
        The measurement, after one warm-up.
    """
    leaves, spec = pytree.tree_flatten(outputs_like)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    explicit = any(t.requires_grad for t in tensors)
    device = next((t.device for t in tensors if t.device.type != "cpu"), torch.device("cpu"))

    def build() -> _Outputs:
        return _Outputs([_leaf(leaf, explicit, symbols) for leaf in leaves], spec)

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        build().run(loss, lambda name: None)
        saves = build().saved_leaves(loss)
        outputs = build()
        trace = trace_memory(lambda mark: outputs.run(loss, mark), device=device)
    tangents: tuple[Tangent | None, ...] = trace.result
    return LossMeasurement(
        kept=trace.live_at("loss"),
        forward_peak=trace.peak_between(None, "loss"),
        backward_peak=trace.peak_between("loss", None),
        tangent_bytes=sum(t.bytes for t in tangents if t is not None),
        tangents=tangents,
        saves=saves,
    )


class _Outputs:
    """Stand-ins for a module's outputs: no leaves of autograd, as a module's own aren't either."""

    def __init__(self, leaves: list[Any], spec: Any) -> None:
        self.leaves = leaves
        self.outputs = pytree.tree_unflatten(leaves, spec)
        self.differentiable = [
            i for i, t in enumerate(leaves) if isinstance(t, torch.Tensor) and t.requires_grad
        ]

    def run(self, loss: Loss | None, mark: Callable[[str], None]) -> tuple[Tangent | None, ...]:
        with torch.enable_grad():
            value = loss_value(loss, self.outputs)
        torch.clear_autocast_cache()
        mark("loss")
        wanted = [self.leaves[i] for i in self.differentiable]
        with autocast_off():
            grads = torch.autograd.grad(value, wanted, allow_unused=True)
        # Only descriptions leave: the profiler would mistake what is freed after its session.
        return _tangents(self.leaves, self.differentiable, grads)

    def saved_leaves(self, loss: Loss | None) -> tuple[bool, ...]:
        seen: set[int] = set()

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen.add(tensor.untyped_storage()._cdata)
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            value = loss_value(loss, self.outputs)
        torch.clear_autocast_cache()
        del value
        return tuple(
            isinstance(t, torch.Tensor) and t.untyped_storage()._cdata in seen for t in self.leaves
        )


def _leaf(value: Any, explicit: bool, symbols: Substitution | None) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    shape = tuple(concrete(size, symbols) for size in value.shape)
    stride = tuple(concrete(size, symbols) for size in value.stride())
    tensor = TensorSpec(0, shape, stride, value.dtype, value.device).build()
    wants = value.requires_grad if explicit else value.is_floating_point() or value.is_complex()
    if not wants:
        return tensor
    with torch.enable_grad():
        return _AsOutput.apply(tensor.requires_grad_())


class _AsOutput(torch.autograd.Function):
    """The identity, whose result is no leaf."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0]


def _tangents(
    leaves: list[Any], differentiable: list[int], grads: tuple[Any, ...]
) -> tuple[Tangent | None, ...]:
    found: list[Tangent | None] = [None] * len(leaves)
    seen: set[int] = set()
    for index, grad in zip(differentiable, grads, strict=True):
        if grad is None:
            continue
        storage = grad.untyped_storage()
        size = 0 if storage._cdata in seen else storage.nbytes()
        seen.add(storage._cdata)
        found[index] = Tangent(tuple(grad.shape), tuple(grad.stride()), size)
    return tuple(found)

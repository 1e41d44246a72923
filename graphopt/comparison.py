"""Numeric comparison of two modules that should do the same: outputs, gradients, buffers."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.cost.losses import default_loss, loss_value
from graphopt.cost.preserve import preserved
from graphopt.errors import NothingToTrainError
from graphopt.ir.randomness import seed_torch
from graphopt.ir.trees import Tree, flatten
from graphopt.ir.untouched import autocast_off

_MOST_NOISE = 1e-3
_MOST_SENSITIVITY = 1e-2
_NUDGES = 3
_PLAIN = (str, int, float, bool, complex, tuple, type(None))


@dataclass(frozen=True)
class Observation:
    """What one run of a module gave.

    Attributes:
        structure: Tree of the outputs with shape and dtype at its leaves.
        outputs: Tensors of the outputs by position.
        gradients: Gradients of parameters by name and of inputs as ``input[i]``; empty for a
            forward alone.
        buffers: Buffers by name after the run.
    """

    structure: str
    outputs: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Difference:
    """The worst difference of one kind.

    Attributes:
        kind: ``outputs``, ``gradients`` or ``buffers``.
        name: Where.
        error: ``||a - b|| / ||a||``; infinite where shapes differ or only one is finite.
    """

    kind: str
    name: str
    error: float


def observe(
    module: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    training: bool | None,
    loss: Callable[..., Any] | None = None,
    seed: int = 0,
) -> Observation:
    """Run a module once and leave it as it was.

    Args:
        module: The module.
        args: Positional inputs.
        kwargs: Keyword inputs.
        training: True: one step with gradients in train mode; False: a forward in eval mode
            without gradients; None: one step in the modes that the submodules have.
        loss: ``loss(outputs)``; None: `probe_loss`.
        seed: Seed of all random draws.

    Returns:
        What the run gave.  A model with nothing to train gives no gradients.
    """
    with preserved(module, args, kwargs) as (inputs, keywords), _plain_attention():
        if training is not None:
            module.train(training)
        # Cut aliases to the caller's tensors: a model may write to its inputs.
        inputs, keywords = pytree.tree_map(_private, (inputs, keywords))
        seed_torch(seed)
        with torch.set_grad_enabled(training is not False):
            outputs = module(*inputs, **keywords)
        if training is not False:
            _backward(outputs, loss)
        tensors = flatten(outputs)[0]
        return Observation(
            structure=_structure(outputs),
            outputs={f"output[{i}]": t.detach().clone() for i, t in enumerate(tensors)},
            gradients=_gradients(module, (inputs, keywords)) if training is not False else {},
            buffers={name: b.detach().clone() for name, b in module.named_buffers()},
        )


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fast path of `nn.TransformerEncoder` in eval mode.

    It changes numbers: padded positions become zeros, but only while no gradients are recorded.
    """
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def differences(expected: Observation, got: Observation) -> list[Difference]:
    """The worst difference of each kind between two observations, those without error left out."""
    found = []
    for kind in ("outputs", "gradients", "buffers"):
        worst = _worst(kind, getattr(expected, kind), getattr(got, kind))
        if worst is not None and worst.error > 0:
            found.append(worst)
    return found


def unequal(
    expected: Observation,
    got: Observation,
    allowed: float | Mapping[str, float | None],
    again: Callable[[], Observation],
    nudged: Callable[[int], Observation] | None = None,
) -> Difference | None:
    """The first kind of difference that is larger than allowed.

    Args:
        expected: How it should be.
        got: How it is.
        allowed: Relative error, for all kinds or by kind (None: anything goes).
        again: Observes the expected side once more: a kernel that isn't deterministic (atomics,
            threads) differs from itself, and ten times that much is allowed, up to 1e-3.
        nudged: Observes the expected side with parameters off by rounding, for a seed: where
            another kernel rounds otherwise, an element may come to lie on the other side of a
            kink, and what the model itself then differs by is allowed, up to 1e-2.

    Returns:
        The difference, or None where all is well.
    """
    for worst in differences(expected, got):
        limit = allowed.get(worst.kind) if isinstance(allowed, Mapping) else allowed
        if limit is None or worst.error <= limit:
            continue
        noise = [d.error for d in differences(expected, again()) if d.kind == worst.kind]
        limit = max(limit, min(_MOST_NOISE, 10 * max(noise, default=0.0)))
        if worst.error > limit and nudged is not None:
            drawn = [d for seed in range(_NUDGES) for d in differences(expected, nudged(seed))]
            moved = max((d.error for d in drawn if d.kind == worst.kind), default=0.0)
            limit = max(limit, min(_MOST_SENSITIVITY, 3 * moved))
        if worst.error > limit:
            return worst
    return None


def nudged(module: nn.Module, seed: int) -> nn.Module:
    """A copy whose parameters are off by two units in the last place, up or down at random."""
    moved = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in moved.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
                step = 2 * torch.finfo(parameter.dtype).eps
                parameter.mul_(1 + step * signs.to(parameter))
    return moved


def relative_error(expected: torch.Tensor, got: torch.Tensor, scale: float = 0.0) -> float:
    """``||expected - got|| / ||expected||``, 0 where both are equal bit for bit, NaN included.

    Args:
        expected: How it should be.
        got: How it is.
        scale: The norm that counts where that of ``expected`` is smaller.
    """
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return float("inf")
    same_nan = torch.equal(expected.isnan(), got.isnan())
    if same_nan and torch.equal(expected.nan_to_num(), got.nan_to_num()):
        return 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    a, b = expected.to(wide), got.to(wide)
    error = float((a - b).norm() / a.norm().clamp_min(max(scale, torch.finfo(torch.float64).tiny)))
    return error if error == error else float("inf")


def non_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Name of the first tensor that holds NaN or infinity, or None."""
    for name, tensor in tensors.items():
        floating = tensor.is_floating_point() or tensor.is_complex()
        if floating and not bool(tensor.isfinite().all()):
            return name
    return None


def probe_loss(outputs: Any) -> torch.Tensor:
    """The model's own scalar loss if its outputs have one, else a weighted sum of all of them.

    A plain sum has zero gradient through softmax and normalisation, so that wrong gradients could
    not be seen; the weights are cosines of the position.

    Raises:
        NothingToTrainError: No output is floating.
    """
    own = default_loss(outputs)
    leaves = flatten(outputs)[0]
    if any(own is leaf for leaf in leaves):
        return own
    total = own.new_zeros(())
    for leaf in leaves:
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf)
        if leaf.is_floating_point():
            flat = leaf.reshape(-1)
            weights = torch.arange(flat.numel(), device=flat.device).remainder(97).to(flat.dtype)
            total = total + (flat * weights.cos()).sum()
    return total


def _private(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    twin = value.detach().clone()
    if value.requires_grad:
        twin.requires_grad_()
    return twin


def _backward(outputs: Any, loss: Callable[..., Any] | None) -> None:
    try:
        value = loss_value(loss or probe_loss, outputs)
    except NothingToTrainError:
        return
    with autocast_off():
        value.backward()


def _gradients(module: nn.Module, inputs: Any) -> dict[str, torch.Tensor]:
    tensors = [t for t in pytree.tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    named: dict[str, torch.Tensor] = dict(module.named_parameters())
    named.update({f"input[{i}]": t for i, t in enumerate(tensors) if t.requires_grad})
    # Absent and zero gradients are the same to an optimizer that skips neither: compare as zero.
    return {
        name: (torch.zeros_like(t) if t.grad is None else t.grad).detach().clone()
        for name, t in named.items()
        if t.requires_grad
    }


def _structure(outputs: Any) -> str:
    tensors, tree = flatten(outputs)
    described = [f"{tuple(t.shape)}:{t.dtype}" for t in tensors]
    return f"{_named(tree)} {described}"


def _named(tree: Tree) -> str:
    """A tree as text, without addresses."""
    context = tree.context
    text = repr(context) if isinstance(context, _PLAIN) else type(context).__name__
    inside = ", ".join(_named(child) for child in tree.children)
    return f"{getattr(tree.type, '__name__', tree.kind)}({text}: {inside})"


def _worst(
    kind: str, expected: Mapping[str, torch.Tensor], got: Mapping[str, torch.Tensor]
) -> Difference | None:
    # A gradient that is zero but for rounding, such as that of a bias before BatchNorm, is compared
    # on the scale of the others.
    largest = max((float(t.double().norm()) for t in expected.values()), default=0.0)
    scale = 1e-2 * largest if kind == "gradients" else 0.0
    worst: Difference | None = None
    for name in {**expected, **got}:
        if name not in expected or name not in got:
            return Difference(kind, name, float("inf"))
        error = relative_error(expected[name], got[name], scale)
        if worst is None or error > worst.error:
            worst = Difference(kind, name, error)
    return worst

"""Running a module for one step and comparing two such runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo.registry import Inputs, ZooModel

RELATIVE = 1e-5


@dataclass
class Run:
    """What one call left behind, detached from later changes."""

    outputs: Any
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    input_gradients: list[Tensor | None] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def clone_inputs(inputs: Inputs, *, differentiable: bool = False) -> Inputs:
    """Fresh tensors with the same values; floating ones are leaves that ask for gradients."""

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = leaf.detach().clone()
        return copy.requires_grad_(differentiable and copy.is_floating_point())

    return pytree.tree_map(clone, inputs)


def _frozen(outputs: Any) -> Any:
    """Detached copies of the tensors; their ``requires_grad`` is kept as an attribute."""

    def freeze(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        copy = leaf.detach().clone()
        copy.needed_grad = leaf.requires_grad  # type: ignore[attr-defined]
        return copy

    return pytree.tree_map(freeze, outputs)


def run(
    module: nn.Module,
    entry: ZooModel,
    *,
    batch: int | None = None,
    seed: int = 11,
    backward: bool = True,
    steps: int = 1,
    differentiable: bool = False,
    inputs: Inputs | None = None,
) -> Run:
    """Run ``steps`` seeded steps (gradients accumulate) and record the last one.

    Args:
        module: the model in the mode wanted.
        entry: gives inputs and loss.
        batch: batch size; the example's if left out.
        seed: seed of the global generator before the first step.
        backward: call backward on the loss.
        steps: number of steps.
        differentiable: ask for the gradients of floating inputs.
        inputs: inputs to use in place of the entry's; they are passed as they are.
    """
    module.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    record = Run(None)
    for _ in range(steps):
        given = inputs or clone_inputs(entry.inputs(batch), differentiable=differentiable)
        outputs = module(*given[0], **given[1])
        record.outputs = _frozen(outputs)
        if backward:
            loss = entry.loss(outputs)
            loss.backward()
            record.loss = loss.detach().clone()
        record.input_gradients = [
            leaf.grad for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor)
        ]
        del outputs
    record.gradients = {
        name: None if p.grad is None else p.grad.detach().clone()
        for name, p in module.named_parameters()
    }
    record.buffers = {name: b.detach().clone() for name, b in module.named_buffers()}
    module.zero_grad(set_to_none=True)
    return record


def tensor_problem(
    got: Tensor, want: Tensor, *, exact: bool = False, scale: float = 0.0
) -> str | None:
    """Why two tensors differ by more than :data:`RELATIVE` in norm, or None.

    Args:
        got: tensor under test.
        want: reference.
        exact: demand equal bits.
        scale: norm below which the reference's norm is not taken as the measure (sums that cancel).
    """
    if (got.shape, got.dtype, got.device) != (want.shape, want.dtype, want.device):
        return f"{got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
    if torch.equal(got, want):
        return None
    if exact or not (want.is_floating_point() or want.is_complex()):
        differing = int((got != want).sum())
        return f"{differing} of {want.numel()} elements differ, {_error(got, want):.2e} in norm"
    if not torch.equal(torch.isfinite(got), torch.isfinite(want)):
        return "other elements are not finite"
    finite = torch.isfinite(want)
    error = _error(got[finite], want[finite], scale)
    return f"relative error {error:.2e}" if error > RELATIVE else None


def _error(got: Tensor, want: Tensor, scale: float = 0.0) -> float:
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.to(wide), want.to(wide)
    return float((got - want).norm()) / max(float(want.norm()), scale, 1e-30)


def output_problems(got: Any, want: Any, *, exact: bool = False) -> Iterator[str]:
    """Differences of two output pytrees: structure, types, constants, values, gradient flags."""
    left, left_spec = pytree.tree_flatten(got)
    right, right_spec = pytree.tree_flatten(want)
    if type(got) is not type(want) or left_spec != right_spec:
        yield f"output structure {left_spec} instead of {right_spec}"
        return
    for index, (a, b) in enumerate(zip(left, right, strict=True)):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            problem = tensor_problem(a, b, exact=exact)
            if problem:
                yield f"output {index}: {problem}"
            flags = (getattr(a, "needed_grad", None), getattr(b, "needed_grad", None))
            if flags[0] != flags[1]:
                yield f"output {index}: requires_grad is {flags[0]} instead of {flags[1]}"
        elif type(a) is not type(b) or a != b:
            yield f"output {index}: {a!r} instead of {b!r}"


def gradient_problems(
    got: dict[str, Tensor | None], want: dict[str, Tensor | None], *, exact: bool = False
) -> Iterator[str]:
    """Differences of gradients by parameter name; an absent gradient equals absent only."""
    if got.keys() != want.keys():
        yield f"gradients of {sorted(got.keys() ^ want.keys())} on one side only"
    largest = max((float(g.norm()) for g in want.values() if g is not None), default=0.0)
    for name in want.keys() & got.keys():
        a, b = got[name], want[name]
        if (a is None) != (b is None):
            yield f"gradient of {name} is {'missing' if a is None else 'there, eager has none'}"
        elif a is not None and b is not None:
            problem = tensor_problem(a, b, exact=exact, scale=5e-2 * largest)
            if problem:
                yield f"gradient of {name}: {problem}"


def buffer_problems(
    got: dict[str, Tensor], want: dict[str, Tensor], *, exact: bool = False
) -> Iterator[str]:
    """Differences of buffers by name."""
    if got.keys() != want.keys():
        yield f"buffers {sorted(got.keys() ^ want.keys())} on one side only"
    for name in want.keys() & got.keys():
        problem = tensor_problem(got[name], want[name], exact=exact)
        if problem:
            yield f"buffer {name}: {problem}"


def run_problems(got: Run, want: Run, *, exact: bool = False) -> Iterator[str]:
    """Every difference between two runs."""
    yield from output_problems(got.outputs, want.outputs, exact=exact)
    if got.loss is not None and want.loss is not None:
        problem = tensor_problem(got.loss, want.loss, exact=exact)
        if problem:
            yield f"loss: {problem}"
    yield from gradient_problems(got.gradients, want.gradients, exact=exact)
    yield from buffer_problems(got.buffers, want.buffers, exact=exact)
    pairs = zip(got.input_gradients, want.input_gradients, strict=True)
    for index, (a, b) in enumerate(pairs):
        yield from gradient_problems({f"input {index}": a}, {f"input {index}": b}, exact=exact)

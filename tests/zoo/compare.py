"""Running a module for one step and comparing two such runs."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.ir.module import OptimizedModule
from tests.zoo.registry import Inputs, ZooModel

RELATIVE = 1e-5
# A gradient that cancels (a bias before BatchNorm) is rounding noise.  What is allowed there is a
# few times what eager itself is off, and in no case more than this share of the largest gradient.
NOISE, MOST_NOISE = 10.0, 5e-7


@dataclass
class Run:
    """What one call left behind, detached from later changes."""

    outputs: Any
    loss: Tensor | None = None
    gradients: dict[str, Tensor | None] = field(default_factory=dict)
    input_gradients: list[Tensor | None] = field(default_factory=list)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    again: Callable[[], Run] | None = field(default=None, repr=False)

    @functools.cached_property
    def exact(self) -> Run | None:
        """The same run in float64, or None where the model has none."""
        try:
            return None if self.again is None else self.again()
        except Exception:  # whatever a model with fixed dtypes raises
            return None


def clone_inputs(inputs: Inputs, *, differentiable: bool = False) -> Inputs:
    """Fresh tensors with the same values; floating ones are leaves that ask for gradients."""

    def clone(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        twin = leaf.detach().clone()
        return twin.requires_grad_(differentiable and twin.is_floating_point())

    return pytree.tree_map(clone, inputs)


def _frozen(outputs: Any) -> Any:
    """Detached copies of the tensors; their ``requires_grad`` is kept as an attribute."""

    def freeze(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        frozen = leaf.detach().clone()
        frozen.needed_grad = leaf.requires_grad  # type: ignore[attr-defined]
        return frozen

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
    record = Run(None)
    if backward and not isinstance(module, OptimizedModule):
        settings = {"batch": batch, "seed": seed, "steps": steps, "differentiable": differentiable}
        with contextlib.suppress(Exception):  # some models can't be copied
            twin = copy.deepcopy(module)
            record.again = functools.partial(_in_float64, twin, entry, inputs, settings)
    torch.manual_seed(seed)
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


def _in_float64(
    module: nn.Module, entry: ZooModel, inputs: Inputs | None, settings: dict[str, Any]
) -> Run:
    def wide(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    given = inputs or clone_inputs(
        entry.inputs(settings["batch"]), differentiable=settings["differentiable"]
    )
    with torch.random.fork_rng():
        return run(module.double(), entry, inputs=pytree.tree_map(wide, given), **settings)


def tensor_problem(
    got: Tensor, want: Tensor, *, exact: bool = False, noise: float = 0.0
) -> str | None:
    """Why two tensors differ by more than :data:`RELATIVE` in norm, or None.

    Args:
        got: tensor under test.
        want: reference.
        exact: demand equal bits.
        noise: norm of a difference that is allowed whatever the reference's norm is.
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
    error = _error(got[finite], want[finite])
    if error <= RELATIVE or _distance(got[finite], want[finite]) <= noise:
        return None
    return f"relative error {error:.2e}"


def _error(got: Tensor, want: Tensor) -> float:
    return _distance(got, want) / max(float(want.to(_wide(want)).norm()), 1e-30)


def _distance(got: Tensor, want: Tensor) -> float:
    return float((got.to(_wide(want)) - want.to(_wide(want))).norm())


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.complex128 if tensor.is_complex() else torch.float64


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
    got: dict[str, Tensor | None],
    want: dict[str, Tensor | None],
    *,
    exact: bool = False,
    truth: Callable[[], dict[str, Tensor | None] | None] = lambda: None,
) -> Iterator[str]:
    """Differences of gradients by parameter name; an absent gradient equals absent only.

    Args:
        got: gradients under test.
        want: reference.
        exact: demand equal bits.
        truth: gives the reference in float64, or None; asked only where the two differ.
    """
    if got.keys() != want.keys():
        yield f"gradients of {sorted(got.keys() ^ want.keys())} on one side only"
    largest = max((float(g.norm()) for g in want.values() if g is not None), default=0.0)
    for name in want.keys() & got.keys():
        a, b = got[name], want[name]
        if (a is None) != (b is None):
            yield f"gradient of {name} is {'missing' if a is None else 'there, eager has none'}"
        elif a is not None and b is not None:
            problem = tensor_problem(a, b, exact=exact)
            if problem and not exact:
                noise = min(NOISE * _off(b, (truth() or {}).get(name)), MOST_NOISE * largest)
                problem = tensor_problem(a, b, noise=noise)
            if problem:
                yield f"gradient of {name}: {problem}"


def _off(eager: Tensor, exact: Tensor | None) -> float:
    """How far eager's own gradient is from a better one: unknown if there is none."""
    if exact is None or exact.dtype == eager.dtype:
        return float("inf")
    return _distance(eager, exact)


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
    yield from gradient_problems(
        got.gradients,
        want.gradients,
        exact=exact,
        truth=lambda: want.exact and want.exact.gradients,
    )
    yield from buffer_problems(got.buffers, want.buffers, exact=exact)
    pairs = (_by_input(r.input_gradients) for r in (got, want))
    yield from gradient_problems(
        *pairs, exact=exact, truth=lambda: want.exact and _by_input(want.exact.input_gradients)
    )


def _by_input(gradients: list[Tensor | None]) -> dict[str, Tensor | None]:
    return {f"input {index}": gradient for index, gradient in enumerate(gradients)}

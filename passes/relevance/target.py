"""What is explained: one number of the output for each sample."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.signature import Signature, leaf_paths

Target = Any  # "argmax", an int, a sequence or tensor of them, or a function of the output

LARGEST = "argmax"


def check_target(target: Target) -> Target:
    """A target as it is used from now on.

    Args:
        target: ``"argmax"``, an index, a sequence or tensor of them (``[samples]``, or ``[targets,
            samples]`` for several targets at once), or a function of the output that gives one
            value for each sample.

    Raises:
        UsageError: It is none of these.
    """
    if callable(target) or (isinstance(target, str) and target == LARGEST):
        return target
    if isinstance(target, bool | str):
        raise UsageError(
            f"target={target!r} isn't known",
            hint="use 'argmax', a class index, a tensor of them, or a function of the output",
        )
    try:
        found = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"target={target!r} isn't known: {error}") from error
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if found.numel() and not whole:
        raise UsageError("class indices are integers", hint="target=scores.argmax(-1)")
    if found.ndim > 2 or not found.numel():
        raise UsageError(
            f"a target of shape {tuple(found.shape)}",
            hint="[samples], or [targets, samples] for several targets at once",
        )
    return found.to(torch.int64)


def explained_outputs(target: Target, flat: Sequence[Any], signature: Signature) -> list[int]:
    """Which flat results a target is about.

    A function of the output says so itself; a class index is about the logits, or else about the
    first floating result that has classes.

    Args:
        target: As `check_target` gives it.
        flat: Results on the example inputs.
        signature: The model's.

    Raises:
        UsageError: There is nothing floating, or a function of the output can't be used.
    """
    if not isinstance(target, str | Tensor):
        grads = gradient_of(target, flat, signature)
        return [i for i, grad in enumerate(grads) if grad is not None]
    paths = leaf_paths(signature.out_spec, "output")
    floating = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.is_floating_point()]
    named = [i for i in floating if re.search(r"\blogits\b", paths[i])]
    classes = [i for i in floating if flat[i].ndim > 1]
    found = named or classes or [i for i in floating if flat[i].ndim == 1]
    if not found:
        raise UsageError(
            "the output has no scores of classes",
            hint="give target=a function of the output that gives one value for each sample",
        )
    return found[:1]


def classes_of(output: Tensor) -> Tensor:
    """The scores among which a class is chosen, ``[samples, classes]``.

    Those of the last place of a sequence, if the output is one.
    """
    if output.ndim == 1:
        return output[:, None]
    if output.ndim == 2:
        return output
    if output.ndim == 3:
        return output[:, -1]
    return output.flatten(1)


def one_hot(output: Tensor, index: Tensor) -> Tensor:
    """One where the chosen classes stand in an output, else zero."""
    scores = classes_of(output)
    row = torch.zeros_like(scores).scatter(1, index[:, None], 1.0)
    if output.ndim == 3:
        return torch.ops.aten.select_backward(row, output.shape, 1, -1)
    return row.reshape(output.shape)


def gradient_of(
    function: Callable[[Any], Tensor], flat: Sequence[Any], signature: Signature
) -> list[Tensor | None]:
    """The gradient of a function of the output with respect to each flat result.

    Raises:
        UsageError: The function fails, doesn't give one value for each sample, or doesn't depend on
            the output.
    """
    leaves = [
        t.detach().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in flat
    ]
    with torch.enable_grad():
        values = _called(function, signature.unflatten_outputs(leaves))
        total = values.sum() if isinstance(values, Tensor) else None
    if not isinstance(values, Tensor) or values.ndim != 1:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UsageError(
            f"target gives {got}, not one value for each sample",
            hint="return a tensor of shape [samples], such as output.logits[:, 3]",
        )
    wanted = [t for t in leaves if isinstance(t, Tensor) and t.requires_grad]
    if total is None or not total.requires_grad:
        raise UsageError("target doesn't depend on the output")
    grads = iter(torch.autograd.grad(total, wanted, allow_unused=True))
    return [next(grads) if isinstance(t, Tensor) and t.requires_grad else None for t in leaves]


def _called(function: Callable[[Any], Tensor], output: Any) -> Any:
    try:
        return function(output)
    except Exception as error:
        raise UsageError(
            f"target fails on the output: {type(error).__name__}: {error}",
            hint=f"it gets what the model returns, here of type {type(output).__name__}",
        ) from error


def check_range(index: Tensor, classes: int, samples: int) -> None:
    """Check class indices before a run.

    Raises:
        UsageError: One is out of range, or there are more or fewer than samples.
    """
    if index.ndim and index.shape[-1] != samples:
        raise UsageError(
            f"{index.shape[-1]} targets for a batch of {samples}",
            hint="give one index for each sample, or a single one for all",
        )
    wrong = index[(index < -classes) | (index >= classes)]
    if wrong.numel():
        raise UsageError(
            f"target {int(wrong[0])} is out of range: the model has {classes} classes",
            hint=f"an index lies between 0 and {classes - 1}; -1 is the last one",
        )

"""The contract of an emitted module, checked against the source model.

``problems(entry, build)`` builds one emission and runs every check of :data:`CHECKS` on it; what
comes back is a list of sentences, empty when the contract is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo.checks import CHECKS, Build, Subject, tensors_of
from tests.zoo.registry import ZooModel

__all__ = ["CHECKS", "Build", "Subject", "problems", "state_of", "state_problems"]


def state_of(module: nn.Module) -> dict[str, Any]:
    """All of a model and of torch that building an emission must leave alone."""
    return {
        "tensors": tensors_of(module),
        "pointers": {k: v.data_ptr() for k, v in tensors_of(module, copies=False).items()},
        "gradients": {
            k: None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()
        },
        "flags": {k: p.requires_grad for k, p in module.named_parameters()},
        "modes": {k: m.training for k, m in module.named_modules()},
        "attributes": {k: sorted(vars(m)) for k, m in module.named_modules()},
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "dtype": torch.get_default_dtype(),
        "threads": torch.get_num_threads(),
    }


def state_problems(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """What of :func:`state_of` has changed."""
    for key, value in before.items():
        left, left_spec = pytree.tree_flatten(value)
        right, right_spec = pytree.tree_flatten(after[key])
        same = left_spec == right_spec and all(
            torch.equal(a, b) if isinstance(a, Tensor) else a == b
            for a, b in zip(left, right, strict=True)
        )
        if not same:
            yield f"the source's {key} changed"


def problems(
    entry: ZooModel,
    build: Build,
    *,
    load: Callable[[Path], nn.Module] | None = None,
    recapture: Build | None = None,
    checks: tuple[str, ...] = tuple(CHECKS),
) -> list[str]:
    """Build one emission and hold it against the contract.

    Args:
        entry: the zoo model.
        build: ``build(model, args, kwargs)`` captures, transforms and emits.
        load: reads a saved module; no save/load check if left out.
        recapture: emits an emitted module again; no such check if left out.
        checks: names in :data:`CHECKS`.
    """
    source, (args, kwargs) = entry.model(), entry.inputs()
    trainable = "no_parameters" not in entry.tags
    if trainable:
        source.eval()  # mode and gradients are the user's own business
        for index, parameter in enumerate(source.parameters()):
            parameter.grad = torch.full_like(parameter, index) if index % 2 else None
    before = state_of(source)
    emitted = build(source, args, kwargs)
    found = [f"build: {text}" for text in state_problems(before, state_of(source))]
    if emitted.training is not source.training:
        found.append(f"build: a model in training={source.training} came back otherwise")
    subject = Subject(entry, emitted, load, recapture, trainable)
    for name in checks:
        try:
            found += [f"{name}: {text}" for text in CHECKS[name](subject)]
        except Exception as error:  # one broken check must not hide the others
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found

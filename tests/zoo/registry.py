"""The registry: what a zoo model is, and how one is declared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

ZOO: dict[str, ZooModel] = {}


def floating_leaves(outputs: object) -> list[Tensor]:
    """Floating or complex tensors in ``outputs``, in pytree order."""
    return [
        leaf
        for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    ]


def plain_loss(outputs: object) -> Tensor:
    """The model's own scalar loss, else the sum of its floating outputs' sums."""
    own = getattr(outputs, "loss", None)
    if own is None and isinstance(outputs, dict):
        own = outputs.get("loss")
    if isinstance(own, Tensor) and own.ndim == 0:
        return own
    return torch.stack([leaf.sum().float() for leaf in floating_leaves(outputs)]).sum()


def probe_loss(outputs: object) -> Tensor:
    """The model's own scalar loss, else a fixed cosine-weighted mean of its floating outputs.

    A plain sum would do for memory, but it has zero gradient through softmax and normalisation
    layers, so that wrong gradients could not be seen.
    """
    own = getattr(outputs, "loss", None)
    if own is None and isinstance(outputs, dict):
        own = outputs.get("loss")
    if isinstance(own, Tensor) and own.ndim == 0:
        return own
    total: Tensor | None = None
    for leaf in floating_leaves(outputs):
        if not leaf.requires_grad:
            continue
        real = torch.view_as_real(leaf) if leaf.is_complex() else leaf
        flat = real.reshape(-1).float()
        weight = torch.arange(flat.numel(), device=flat.device).remainder(97).float().cos()
        term = (flat * weight).mean()
        total = term if total is None else total + term
    if total is None:
        raise ValueError("no output requires a gradient")
    return total


@dataclass(frozen=True)
class ZooModel:
    """A model with its inputs, its loss and what is special about it.

    Attributes:
        name: key in :data:`ZOO`.
        factory: builds the model; called under a fixed seed.
        sample: ``sample(batch)`` gives ``(args, kwargs)`` for that batch size, under a fixed seed.
        batch: example batch size.
        second: another batch size that the captured model must accept.
        loss: scalar loss of the outputs.
        tags: ``slow``, ``hf``, ``real_weights``, ``dropout``, ``batchnorm``, ``plan`` (taken by the
            memory-budget tests), ``static_batch`` (no second batch), ``eval_branch`` ...
        refused: a pattern that the refusal's message must match, if capture must refuse the model.
        unplannable: a pattern for models that capture but have no planned backward.
        requires: distributions that must be installed.
    """

    name: str
    factory: Callable[[], nn.Module]
    sample: Callable[[int], Inputs]
    batch: int = 4
    second: int = 3
    loss: Callable[[Any], Tensor] = probe_loss
    tags: frozenset[str] = field(default_factory=frozenset)
    refused: str | None = None
    unplannable: str | None = None
    requires: tuple[str, ...] = ()

    def model(self) -> nn.Module:
        """A fresh model in training mode: the same parameters every time, global RNG untouched."""
        with torch.random.fork_rng():
            torch.manual_seed(1234)
            return self.factory().train()

    def inputs(self, batch: int | None = None) -> Inputs:
        """``(args, kwargs)`` for a batch size: the same values every time, global RNG untouched."""
        with torch.random.fork_rng():
            torch.manual_seed(4321)
            return self.sample(self.batch if batch is None else batch)

    def __call__(self) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
        """``(model, args, kwargs)``, as the command line's model factories return it."""
        args, kwargs = self.inputs()
        return self.model(), args, kwargs


def zoo(
    sample: Callable[[int], Any], name: str | None = None, tags: str = "", **fields: Any
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    """Declare a zoo model: decorates a model class or a factory.

    Args:
        sample: ``sample(batch)`` gives a tensor, a tuple of positional arguments, a dict of keyword
            arguments, or ``(args, kwargs)``.
        name: key in the registry; the factory's own name in lower case if left out.
        tags: words separated by blanks.
        **fields: other fields of :class:`ZooModel`.
    """

    def declare(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        key = name or factory.__name__.lower()
        if key in ZOO:
            raise ValueError(f"zoo model {key!r} is declared twice")
        ZOO[key] = ZooModel(
            key,
            factory,
            lambda batch: _as_inputs(sample(batch)),
            tags=frozenset(tags.split()),
            **fields,
        )
        return factory

    return declare


def _as_inputs(value: Any) -> Inputs:
    if isinstance(value, Tensor):
        return (value,), {}
    if isinstance(value, dict):
        return (), value
    if len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict):
        return value
    return tuple(value), {}


def randn(*shape: int) -> Callable[[int], Tensor]:
    """A sampler of normal tensors of shape ``(batch, *shape)``."""
    return lambda batch: torch.randn(batch, *shape)

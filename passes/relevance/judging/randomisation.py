"""Sanity checks: a relevance must change when the model's parameters become random."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import (
    InputMismatch,
    ModelError,
    NonFiniteError,
    UsageError,
    first_line,
    suggest,
)
from graphopt.ir.randomness import kept_random_state, seed_torch
from graphopt.passes.relevance.judging.estimate import Estimate, estimate, spearman
from graphopt.passes.relevance.judging.removal import Targets, evaluating, targets_of

Attribute = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]

MODES = ("cascading", "independent")
_BATCH = 64


@dataclass(frozen=True, eq=False)
class Randomisation:
    """How similar a relevance stays to the trained model's as layers become random.

    Attributes:
        mode: ``cascading`` or ``independent``.
        layers: Names of the modules, in the order in which they were randomised.
        similarity: ``(layers, samples)``, float64: Spearman's rank correlation with the relevance
            of the trained model. In cascading mode the last row is that of a model without
            anything learnt.
    """

    mode: str
    layers: tuple[str, ...]
    similarity: Tensor

    @property
    def by_layer(self) -> dict[str, Estimate]:
        """Mean over the samples, for each layer."""
        return dict(zip(self.layers, map(estimate, self.similarity), strict=True))

    @property
    def final(self) -> Estimate:
        """After the last layer; a method that looks at the model at all has it near zero."""
        return estimate(self.similarity[-1])

    @property
    def mean(self) -> Estimate:
        """Mean over the layers; the lower, the more the relevance depends on all of them."""
        return estimate(self.similarity.mean(0))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        layers = {name: found.to_dict() for name, found in self.by_layer.items()}
        return {"mode": self.mode, "layers": layers, "mean": self.mean.to_dict()}


def randomisation_check(
    model: nn.Module,
    inputs: Any,
    attribute: Attribute,
    *,
    targets: Targets = "argmax",
    mode: str = "cascading",
    layers: Sequence[str] | None = None,
    absolute: bool = False,
    seed: int = 0,
) -> Randomisation:
    """Randomise a model's parameters layer by layer and compare the relevance each time.

    Model-parameter randomisation test of Adebayo et al. 2018 ("Sanity checks for saliency maps"):
    ``cascading`` randomises from the outputs down and keeps what is random already, ``independent``
    one layer at a time. A parameter is redrawn from a normal distribution of its own mean and
    deviation, so that activations keep their scale and no attribution differs by that alone.
    Everything happens on a copy; the random state stays as it was. Each call of ``attribute``
    begins with the same seed, so that a method's own noise counts for no difference.

    Args:
        model: Any module, in any mode; the copy is in eval mode.
        inputs: A tensor or a sequence of inputs.
        attribute: ``attribute(module, inputs, targets)`` gives the relevance, ``(samples, ...)``.
        targets: The class that is explained, the same for all: ``argmax`` of the trained model, a
            class, or one for each sample.
        mode: ``cascading`` or ``independent``.
        layers: Names of modules to randomise, in this order; a module takes all parameters below
            it along. None: all modules with parameters of their own, the last to be called first.
        absolute: Compare magnitudes.
        seed: Of the random parameters.

    Raises:
        ModelError: No module, or one that can't be copied or has no parameters.
        UsageError: An unknown mode or layer.
        InputMismatch: A relevance without one row for each sample, or whose shape changes.
        NonFiniteError: A relevance with NaN or infinity.
    """
    if mode not in MODES:
        raise UsageError(f"mode={mode!r}", hint=suggest(str(mode), MODES) or f"one of {MODES}")
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    with kept_random_state():
        twin = _copied(model)
        chosen, called = _targets_and_order(twin, arguments, targets)
        names = _layers(twin, called) if layers is None else _known(twin, layers)
        trained = {name: p.detach().clone() for name, p in twin.named_parameters()}

        def relevance() -> Tensor:
            seed_torch(seed)
            return _read(attribute(twin, arguments, chosen), len(chosen), absolute)

        before = relevance()
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for name in names:
            if mode == "independent":
                _put_back(twin, trained)
            _randomise(twin, name, trained, generator, whole=layers is not None)
            after = relevance()
            if after.shape != before.shape:
                raise InputMismatch("the relevance of a randomised model has another shape")
            rows.append(spearman(before, after))
    return Randomisation(mode, tuple(names), torch.stack(rows).cpu())


def _copied(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"a torch.nn.Module is needed, not {type(model).__name__}")
    try:
        twin = copy.deepcopy(model).eval()
    except Exception as error:  # a user's module may fail in any way
        raise ModelError(f"the model can't be copied: {first_line(error)}") from error
    if not list(twin.parameters()):
        raise ModelError("the model has no parameters to randomise")
    return twin


def _targets_and_order(
    twin: nn.Module, inputs: tuple[Any, ...], targets: Targets
) -> tuple[Tensor, list[str]]:
    """The classes to explain, and the modules in the order of their first call."""
    called: dict[str, None] = {}
    handles = [
        module.register_forward_pre_hook(lambda *_, name=name: called.setdefault(name))
        for name, module in twin.named_modules()
    ]
    try:
        with evaluating(twin), torch.no_grad():
            found = targets_of(twin, inputs, "argmax", _BATCH)
            chosen = targets_of(twin, inputs, targets, _BATCH) if targets != "argmax" else found
    finally:
        for handle in handles:
            handle.remove()
    return chosen, list(called)


def _layers(twin: nn.Module, called: list[str]) -> list[str]:
    """Modules with parameters of their own, the last first; those never called come at the end.

    A module with children is called before them, but what it holds itself may be used anywhere.
    """
    own = [
        n for n, m in twin.named_modules() if next(m.parameters(recurse=False), None) is not None
    ]
    ordered = [name for name in called if name in set(own)]
    return [*reversed(ordered), *(name for name in reversed(own) if name not in set(ordered))]


def _known(twin: nn.Module, layers: Sequence[str]) -> list[str]:
    modules = dict(twin.named_modules())
    for name in layers:
        if name not in modules or next(modules[name].parameters(), None) is None:
            raise UsageError(
                f"no module {name!r} with parameters", hint=suggest(str(name), modules)
            )
    if not layers:
        raise UsageError("no layers to randomise")
    return list(layers)


@torch.no_grad()
def _randomise(
    twin: nn.Module,
    layer: str,
    trained: dict[str, Tensor],
    generator: torch.Generator,
    *,
    whole: bool,
) -> None:
    """Redraw a module's own parameters, or with ``whole`` those below it too."""
    ids = {id(p) for p in twin.get_submodule(layer).parameters(recurse=whole)}
    for name, parameter in twin.named_parameters():
        old = trained[name].float()
        if id(parameter) in ids and trained[name].is_floating_point():
            noise = torch.randn(old.shape, generator=generator).to(old.device)
            parameter.copy_(old.mean() + old.std(correction=0) * noise)


@torch.no_grad()
def _put_back(twin: nn.Module, trained: dict[str, Tensor]) -> None:
    for name, parameter in twin.named_parameters():
        parameter.copy_(trained[name])


def _read(found: Any, samples: int, absolute: bool) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() < 2 or len(found) != samples:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InputMismatch(
            f"attribute gave {shape} for {samples} samples", hint="it must give (samples, ...)"
        )
    if not torch.isfinite(found).all():
        raise NonFiniteError("attribute gave NaN or infinity")
    found = found.detach().to(torch.float64).flatten(1)
    return found.abs() if absolute else found

"""Random small models from a grammar of layers and operators, for the property tests.

A recipe is plain data: how the input looks, and a list of instructions, each the name of an
operator and a seed for its choices.  The model is built by running it: an operator looks at the
values that there are so far, and makes layers that fit them, or nothing where none fits.
Hypothesis shrinks recipes well, since every part of a recipe is a recipe.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.passes.prune.models import randomise

INPUTS: dict[str, Callable[[int], Tensor]] = {
    "image": lambda batch: torch.randn(batch, 3, 8, 8),
    "sequence": lambda batch: torch.randn(batch, 6, 10),
    "vector": lambda batch: torch.randn(batch, 10),
    "ids": lambda batch: torch.randint(0, 11, (batch, 6)),
}
_STEMS: dict[str, Callable[[], nn.Module]] = {
    "image": lambda: nn.Conv2d(3, 8, 3, padding=1),
    "sequence": lambda: nn.Linear(10, 12),
    "vector": lambda: nn.Linear(10, 16),
    "ids": lambda: nn.Embedding(11, 12),
}
WIDTHS = (4, 6, 8, 12, 16)
# Operators that come up more often: they make axes that can be pruned.
_OFTEN = ["linear", "convolution", "hidden", "linear", "convolution"] * 2
# A value with more elements is not worked on any further.
_LARGEST = 20_000


class Step(nn.Module):
    """An operator, its layers, and the places of the values that it is applied to."""

    def __init__(
        self, function: Callable[..., Tensor], sources: Sequence[int], *layers: Any
    ) -> None:
        super().__init__()
        self.function, self.sources = function, tuple(sources)
        self.layers = nn.ModuleList(layer for layer in layers if isinstance(layer, nn.Module))
        self.bare = nn.ParameterList(p for p in layers if isinstance(p, nn.Parameter))

    def forward(self, values: Sequence[Tensor]) -> Tensor:
        given = [values[i] for i in self.sources]
        return self.function(*given, *self.layers, *self.bare)


class Pick:
    """Choices of one instruction."""

    def __init__(self, seed: int, steps: Sequence[Step], values: Sequence[Tensor]) -> None:
        self.random = random.Random(seed)
        self.steps, self.values = steps, values

    def of(self, options: Sequence[Any]) -> Any:
        """One of some options."""
        return options[self.random.randrange(len(options))]

    def yes(self) -> bool:
        """A coin."""
        return self.random.random() < 0.5

    def value(self, *ranks: int, size: Callable[[Tensor], bool] = lambda _: True) -> int:
        """The place of a value, most likely a late one; raises `UnfitError` where there is none."""
        fits = [
            i for i, v in enumerate(self.values)
            if (not ranks or v.ndim in ranks) and v.is_floating_point() and size(v)
        ]  # fmt: skip
        if not fits:
            raise UnfitError
        return fits[-1 - min(int(self.random.expovariate(1.0)), len(fits) - 1)]

    def like(self, place: int, axis: int | None = None) -> int:
        """Another value of the same sizes, but for one axis."""
        want = self.values[place].shape

        def fits(v: Tensor) -> bool:
            return len(v.shape) == len(want) and all(
                a == b or i == axis for i, (a, b) in enumerate(zip(v.shape, want, strict=True))
            )

        return self.value(size=fits)

    def axis(self, place: int) -> int:
        """An axis that is not the batch."""
        rank = self.values[place].ndim
        if rank < 2:
            raise UnfitError
        return self.random.randrange(1, rank)

    def divisor(self, size: int) -> int:
        """A divisor that is neither one nor the size."""
        return self.of(fitting([d for d in range(2, size) if size % d == 0]))


class UnfitError(Exception):
    """The operator fits none of the values."""


def fitting(options: Sequence[Any]) -> Sequence[Any]:
    """The options, of which there must be some."""
    if not options:
        raise UnfitError
    return options


Operator = Callable[[Pick], Step]
OPERATORS: dict[str, Operator] = {}


def operator(function: Operator) -> Operator:
    """Add an operator to the grammar."""
    OPERATORS[function.__name__.strip("_")] = function
    return function


@dataclass(frozen=True)
class Recipe:
    """What a model is built from."""

    start: str
    instructions: tuple[tuple[str, int], ...]
    outputs: int = 1


class Generated(nn.Module):
    """The model of a recipe."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.steps, self.heads = nn.ModuleList(), nn.ModuleList()
        values = [INPUTS[recipe.start](2)]
        self.steps.append(Step(lambda x, f: f(x), (0,), _STEMS[recipe.start]()))
        values.append(self.steps[0](values))
        for name, seed in recipe.instructions:
            try:
                step = OPERATORS[name](Pick(seed, list(self.steps), values))
                made = step(values)
            except UnfitError:
                continue
            if made.numel() <= _LARGEST and made.ndim >= 2 and made.isfinite().all():
                self.steps.append(step)
                values.append(made)
        late = values[-recipe.outputs :]
        for place in range(len(values) - len(late), len(values)):
            self.heads.append(_head(values[place], place))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step in self.steps:
            values.append(step(values))
        return tuple(head(values) for head in self.heads)


def _head(value: Tensor, place: int) -> Step:
    """Means over all axes but one or two, and a linear layer."""
    if value.ndim == 2:
        return Step(lambda x, f: f(x), (place,), nn.Linear(value.shape[1], 3))
    axes = list(range(2, value.ndim))
    if value.ndim == 3 and value.shape[1] < value.shape[2]:
        axes = [1]
    width = value.shape[1] if 1 not in axes else value.shape[2]
    return Step(lambda x, f: f(x.mean(axes)), (place,), nn.Linear(width, 3))


def built(recipe: Recipe, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    """The model of a recipe, in eval mode with random parameters, and an input."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = Generated(recipe).eval().to(dtype)
        randomise(model, 0.5)
        x = INPUTS[recipe.start](2)
    return model, x.to(dtype) if x.is_floating_point() else x


def recipes(most: int = 7) -> st.SearchStrategy[Recipe]:
    """Recipes of up to some instructions."""
    from tests.passes.prune import grammar  # noqa: F401 - declares the operators

    names = [*sorted(OPERATORS), *_OFTEN]
    instruction = st.tuples(st.sampled_from(names), st.integers(0, 9999))
    return st.builds(
        Recipe,
        st.sampled_from(sorted(INPUTS)),
        st.lists(instruction, min_size=2, max_size=most).map(tuple),
        st.sampled_from((1, 1, 2)),
    )

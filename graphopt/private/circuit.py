"""A network as a secure-computation engine sees it: a few arithmetic ops on secret values.

Every engine, and the prediction of what it will cost, reads this form; a model is brought into it
by `graphopt.private.lower`.  The ops:

| op | meaning | who talks |
|---|---|---|
| ``add``, ``sub`` | elementwise, broadcast | nobody |
| ``shift``, ``scale`` | plus, times a public constant | nobody |
| ``sum`` | over dimensions, divided by a public integer | nobody |
| ``move``, ``reshape`` | gather, scatter, permute, pad with zeros, concatenate | nobody |
| ``multiply``, ``square`` | elementwise product of secrets | the parties |
| ``matmul``, ``conv`` | linear maps; with a public operand nobody talks | the parties |
| ``relu``, ``negative`` | ``max(x, 0)``; the bit ``x < 0`` | the parties |
| ``exp``, ``reciprocal``, ``rsqrt``, ``sigmoid``, ``tanh`` | approximated | the parties |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import one_hot

LOCAL_OPS = frozenset({"add", "sub", "shift", "scale", "sum", "move", "reshape"})
PRODUCT_OPS = frozenset({"multiply", "square", "matmul", "conv"})
COMPARISON_OPS = frozenset({"relu", "negative"})
SMOOTH_OPS = frozenset({"exp", "reciprocal", "rsqrt", "sigmoid", "tanh"})
OPS = LOCAL_OPS | PRODUCT_OPS | COMPARISON_OPS | SMOOTH_OPS


@dataclass(frozen=True)
class Site:
    """Where a step comes from.

    Attributes:
        node: Name of the graph node.
        op: The graph's op, such as ``aten.relu.default``.
        line: The user's source line, or None.
    """

    node: str
    op: str = ""
    line: str | None = None


@dataclass(frozen=True)
class Constant:
    """A tensor that is known before the inputs are.

    Attributes:
        tensor: Its value, floating; for the index of a ``move``, integers.
        secret: Whether it belongs to the model's owner and is shared like an input; else public.
    """

    tensor: torch.Tensor
    secret: bool


@dataclass(frozen=True)
class Step:
    """One op.

    Attributes:
        name: Name of the result.
        op: One of `OPS`.
        inputs: Names of earlier steps, inputs or constants.
        shape: Sizes of the result.
        site: Where it comes from.
        attributes: ``conv``: stride, padding, dilation (tuples), groups; ``sum``: dims, keepdim,
            divisor.  The last input of ``move`` is the public constant with its index: place i of
            the result is element ``index[i] - 1`` of the other inputs, flattened and laid end to
            end; 0 stands for a zero.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    site: Site
    attributes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def elements(self) -> int:
        """Elements of the result."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Circuit:
    """A network for fixed input sizes.

    Attributes:
        inputs: Names of the secret inputs, in order, with their sizes.
        constants: Weights and public tensors by name.
        steps: In the order in which they run.
        outputs: Names of the results.
        sources: For each input, which of the model's flat inputs it comes from.
        classes: Inputs that hold integers, such as tokens, by name: their owner shares them one-hot
            over so many classes, in a last dimension.
    """

    inputs: Mapping[str, tuple[int, ...]]
    constants: Mapping[str, Constant]
    steps: tuple[Step, ...]
    outputs: tuple[str, ...]
    sources: tuple[int, ...] = ()
    classes: Mapping[str, int] = field(default_factory=dict)

    def encode(self, flat: Sequence[Any]) -> list[torch.Tensor]:
        """The circuit's inputs from the model's flat inputs."""
        chosen = zip(self.inputs, (flat[i] for i in self.sources), strict=True)
        return [
            one_hot(value, self.classes[name]).double() if name in self.classes else value
            for name, value in chosen
        ]

    def shape(self, name: str) -> tuple[int, ...]:
        """Sizes of a value."""
        return self._shapes[name]

    def elements(self, name: str) -> int:
        """Elements of a value."""
        return math.prod(self._shapes[name])

    def is_public(self, name: str) -> bool:
        """Whether everybody knows a value."""
        return name in self.constants and not self.constants[name].secret

    def __post_init__(self) -> None:
        shapes = dict(self.inputs)
        shapes.update({name: tuple(c.tensor.shape) for name, c in self.constants.items()})
        shapes.update({step.name: step.shape for step in self.steps})
        object.__setattr__(self, "_shapes", shapes)

    _shapes: dict[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)

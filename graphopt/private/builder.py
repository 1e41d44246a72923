"""Building a circuit: arithmetic on values of which some are secret and some are known."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.circuit import Circuit, Constant, Site, Step

MASKED = -128.0
"""What stands for minus infinity: fixed-point numbers have none, and exp(-128) is 0 in all."""

_HUGE = -1e9


@dataclass(frozen=True)
class Shared:
    """A secret value: nobody knows it, the parties hold shares."""

    name: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Ids:
    """Integers that one party knows, such as tokens: good for looking something up."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plain:
    """A value that its owner knows in the clear.

    Attributes:
        tensor: The value.
        secret: Whether it is the model owner's secret; else everybody knows it.
    """

    tensor: torch.Tensor
    secret: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""
        return tuple(self.tensor.shape)


Value = Shared | Plain


class Builder:
    """Collects the steps of a circuit; its methods are the arithmetic that rules are written in."""

    def __init__(self) -> None:
        """Start an empty circuit."""
        self.inputs: dict[str, tuple[int, ...]] = {}
        self.classes: dict[str, int] = {}
        self.constants: dict[str, Constant] = {}
        self.steps: list[Step] = []
        self.places: dict[str, int] = {}
        self.site = Site("")
        self._known: dict[tuple[int, bool], tuple[str, torch.Tensor]] = {}
        self._taken: set[str] = set()

    def circuit(self, outputs: Sequence[str]) -> Circuit:
        """The circuit; steps and constants that no output needs are left out."""
        needed, kept = set(outputs), []
        for step in reversed(self.steps):
            if step.name in needed:
                kept.append(step)
                needed.update(step.inputs)
        constants = {name: c for name, c in self.constants.items() if name in needed}
        inputs = {n: self.inputs[n] for n in sorted(self.inputs, key=self._place)}
        sources = tuple(self._place(name) for name in inputs)
        steps = tuple(reversed(kept))
        return Circuit(inputs, constants, steps, tuple(outputs), sources, self.classes)

    def _place(self, name: str) -> int:
        return self.places.get(name, 0)

    def input(self, name: str, shape: Sequence[int]) -> Shared:
        """A secret input."""
        name = self._fresh(name)
        self.inputs[name] = tuple(shape)
        return Shared(name, tuple(shape))

    def one_hot(self, ids: Ids, classes: int) -> Shared:
        """Integers as their owner shares them: ``(*shape, classes)`` of zeros and ones."""
        if self.classes.setdefault(ids.name, classes) != classes:
            raise UnsupportedError(f"{ids.name!r} is looked up in tables of different sizes")
        shape = (*ids.shape, classes)
        if ids.name not in self.inputs:
            self.input(ids.name, shape)
        return Shared(ids.name, shape)

    def emit(
        self, op: str, inputs: Sequence[Shared | str], shape: Sequence[int], **attributes: Any
    ) -> Shared:
        """Add a step."""
        name = self._fresh(self.site.node)
        names = tuple(i if isinstance(i, str) else i.name for i in inputs)
        self.steps.append(Step(name, op, names, tuple(shape), self.site, attributes))
        return Shared(name, tuple(shape))

    def constant(self, tensor: torch.Tensor, secret: bool) -> str:
        """Name of a constant with this value."""
        known = self._known.get((id(tensor), secret))
        if known is None:
            name = self._fresh(f"{self.site.node}.constant")
            self.constants[name] = Constant(tensor.detach(), secret)
            known = self._known[id(tensor), secret] = (name, tensor)  # keeps the id alive
        return known[0]

    def shared(self, value: Value) -> Shared:
        """The value as the parties hold it."""
        if isinstance(value, Shared):
            return value
        return Shared(self.constant(value.tensor.double(), value.secret), value.shape)

    def _fresh(self, stem: str) -> str:
        name, count = stem, 0
        while name in self._taken:
            count += 1
            name = f"{stem}.{count}"
        self._taken.add(name)
        return name

    # arithmetic ---------------------------------------------------------------------------------

    def add(self, a: Any, b: Any) -> Value:
        """``a + b``."""
        a, b = _value(a), _value(b)
        if isinstance(a, Plain) and isinstance(b, Plain):
            return both(a, b, torch.add)
        if isinstance(a, Plain):
            a, b = b, a
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if isinstance(b, Plain) and not b.secret:
            if not b.tensor.any():
                return self.expand(a, shape)
            tensor = torch.where(b.tensor < _HUGE, MASKED, b.tensor.double())
            return self.emit("shift", [self.shared(a), self.constant(tensor, False)], shape)
        return self.emit("add", [self.shared(a), self.shared(b)], shape)

    def sub(self, a: Any, b: Any) -> Value:
        """``a - b``."""
        a, b = _value(a), _value(b)
        if isinstance(b, Plain):
            return self.add(a, Plain(-b.tensor.double(), b.secret))
        if isinstance(a, Plain) and not a.secret:
            return self.add(self.multiply(b, -1.0), a)
        shape = torch.broadcast_shapes(a.shape, b.shape)
        return self.emit("sub", [self.shared(a), b], shape)

    def multiply(self, a: Any, b: Any) -> Value:
        """``a * b``; a square where both are the same value."""
        a, b = _value(a), _value(b)
        if isinstance(a, Plain) and isinstance(b, Plain):
            return both(a, b, torch.mul)
        if isinstance(a, Plain):
            a, b = b, a
        shape = torch.broadcast_shapes(a.shape, b.shape)
        if isinstance(b, Plain) and not b.secret:
            if bool((b.tensor == 1).all()):
                return self.expand(a, shape)
            return self.emit(
                "scale", [self.shared(a), self.constant(b.tensor.double(), False)], shape
            )
        if a == b:
            return self.emit("square", [self.shared(a)], shape)
        return self.emit("multiply", [self.shared(a), self.shared(b)], shape)

    def power(self, x: Value, exponent: int) -> Value:
        """``x ** exponent`` for a positive integer, by repeated squaring."""
        result: Value | None = None
        while exponent:
            if exponent & 1:
                result = x if result is None else self.multiply(result, x)
            exponent >>= 1
            if exponent:
                x = self.multiply(x, x)
        assert result is not None
        return result

    def matmul(self, a: Any, b: Any) -> Value:
        """Matrix product, batched and broadcast as in ``torch.matmul``."""
        if isinstance(a, Plain) and isinstance(b, Plain):
            return both(a, b, torch.matmul)
        shape = torch.matmul(
            torch.empty(a.shape, device="meta"), torch.empty(b.shape, device="meta")
        )
        return self.emit("matmul", [self.shared(a), self.shared(b)], shape.shape)

    def unary(self, op: str, x: Value) -> Value:
        """A nonlinear op of one value; of a known one it is computed in the clear."""
        if isinstance(x, Plain):
            return Plain(IN_THE_CLEAR[op](x.tensor.double()), x.secret)
        return self.emit(op, [x], x.shape)

    def relu(self, x: Value) -> Value:
        """``max(x, 0)``."""
        return self.unary("relu", x)

    def maximum(self, a: Any, b: Any) -> Value:
        """``max(a, b) = b + relu(a - b)``."""
        return self.add(b, self.relu(self.sub(a, b)))

    def clamp(self, x: Value, low: float | None, high: float | None) -> Value:
        """``min(max(x, low), high)``; both comparisons in one batch: no round more than a ReLU."""
        if low is None and high is None:
            return x
        if high is None:
            return self.add(self.relu(self.sub(x, low)), low)
        if low is None:
            return self.sub(high, self.relu(self.sub(high, x)))
        batch = self.move(torch.stack, [self.sub(x, low), self.sub(x, high)])
        above = self.relu(batch)
        first, second = self.moves(torch.unbind, [above], whole=False)
        return self.add(self.sub(first, second), low)

    def sum(self, x: Value, dims: Sequence[int], keepdim: bool = False, divisor: int = 1) -> Value:
        """Sum over dimensions, divided by an integer."""
        rank = len(x.shape)
        axes = tuple(sorted(d % rank for d in dims))
        if isinstance(x, Plain):
            return Plain(x.tensor.double().sum(axes, keepdim) / divisor, x.secret)
        kept = [1 if i in axes else n for i, n in enumerate(x.shape) if keepdim or i not in axes]
        return self.emit("sum", [x], kept, dims=axes, keepdim=keepdim, divisor=divisor)

    def mean(self, x: Value, dims: Sequence[int], keepdim: bool = False) -> Value:
        """Mean over dimensions."""
        return self.sum(x, dims, keepdim, math.prod(x.shape[d] for d in dims))

    def largest(self, x: Value, dim: int) -> Value:
        """Maximum over a dimension, which stays with size 1, as a tournament: log2 n comparisons
        deep, n - 1 comparisons in all."""  # noqa: D205, D209
        while x.shape[dim] > 1:
            half = x.shape[dim] // 2
            first, second, rest = self.moves(
                lambda t, h=half: t.split([h, h, t.shape[dim] - 2 * h], dim), [x], whole=False
            )
            x = self.maximum(first, second)
            if rest.shape[dim]:
                x = self.move(lambda *t: torch.cat(t, dim), [x, rest], whole=False)
        return x

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        """Broadcast to a shape."""
        if x.shape == tuple(shape):
            return x
        return self.move(lambda t: t.expand(tuple(shape)), [x], whole=False)

    # data movement ------------------------------------------------------------------------------

    def move(
        self, function: Callable[..., torch.Tensor], values: Sequence[Value], *, whole: bool = True
    ) -> Value:
        """What a function that only moves data makes of values; see `moves`."""
        return self.moves(lambda *given: [function(*given)], values, whole=whole)[0]

    def moves(
        self,
        function: Callable[..., Sequence[torch.Tensor]],
        values: Sequence[Value],
        *,
        whole: bool = True,
    ) -> list[Value]:
        """The results of a function that moves data, found by running it on places.

        Args:
            function: Takes one tensor for each value and returns tensors of their elements or
                zeros.
            values: What it moves.
            whole: Hand the tensors over as one list.
        """
        places, start = [], 1
        for value in values:
            count = math.prod(value.shape)
            place = torch.arange(start, start + count, dtype=torch.float64).reshape(value.shape)
            if isinstance(value, Plain) and not value.secret and not value.tensor.any():
                place = torch.zeros(value.shape, dtype=torch.float64)
            else:
                start += count
            places.append(place)
        moved = [v for v, p in zip(values, places, strict=True) if p.any() or not p.numel()]
        results = function(places) if whole else function(*places)
        return [self._moved(moved, result) for result in results]

    def _moved(self, values: Sequence[Value], places: torch.Tensor) -> Value:
        values, index = _used(values, places.round().long())
        shape = tuple(index.shape)
        if all(isinstance(v, Plain) for v in values):
            flat = [v.tensor.double().reshape(-1) for v in values]  # type: ignore[union-attr]
            table = torch.cat([torch.zeros(1, dtype=torch.float64), *flat])
            return Plain(table[index], any(v.secret for v in values))  # type: ignore[union-attr]
        total = sum(math.prod(v.shape) for v in values)
        straight = len(values) == 1 and index.numel() == total
        if straight and torch.equal(index.reshape(-1), torch.arange(1, total + 1)):
            if values[0].shape == shape:
                return values[0]
            return self.emit("reshape", [self.shared(values[0])], shape)
        names: list[Shared | str] = [self.shared(value) for value in values]
        return self.emit("move", [*names, self.constant(index, False)], shape)


def _used(values: Sequence[Value], index: torch.Tensor) -> tuple[list[Value], torch.Tensor]:
    """Those values of which something is taken, and the index into them alone."""
    kept, renewed, start, shift = [], index.clone(), 1, 0
    for value in values:
        end = start + math.prod(value.shape)
        inside = (index >= start) & (index < end)
        if bool(inside.any()):
            kept.append(value)
            renewed[inside] -= shift
        else:
            shift += end - start
        start = end
    return kept, renewed


def both(a: Plain, b: Plain, function: Callable[..., torch.Tensor]) -> Plain:
    """A function of two known values."""
    return Plain(function(a.tensor.double(), b.tensor.double()), a.secret or b.secret)


def _value(value: Any) -> Value:
    if isinstance(value, (Shared, Plain)):
        return value
    if isinstance(value, (bool, int, float)):
        return Plain(torch.tensor(float(value), dtype=torch.float64))
    raise UnsupportedError(f"a {type(value).__name__} where a tensor or number is needed")


IN_THE_CLEAR: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": torch.relu,
    "negative": lambda x: (x < 0).double(),
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
"""Nonlinear ops on known values."""

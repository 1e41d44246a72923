"""Budgets: how much memory, how many FLOPs, ... the result may take.

A budget reads from text (``"memory=50%,flops=1.2e9"``), from a mapping or from fields, and prints
as text that reads back as the same budget.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, ClassVar, Final, Literal

from graphopt.errors import BudgetError, suggest

Unit = Literal["%", "B", "s", ""]

_BYTE_UNITS: Final = {
    "b": 1,
    **{f"{p}b": 1000 ** (i + 1) for i, p in enumerate("kmgt")},
    **{f"{p}ib": 1024 ** (i + 1) for i, p in enumerate("kmgt")},
}
_SECOND_UNITS: Final = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_COUNT_UNITS: Final = {"k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12}
_SCALES: Final[Mapping[str, Mapping[str, float]]] = {
    "B": _BYTE_UNITS,
    "s": _SECOND_UNITS,
    "": _COUNT_UNITS,
}
# Bits a second and seconds there and back; `graphopt.private.network` reads them.
_LINK = re.compile(r"[\d.eE+]+\s*,\s*[\d.eE+-]+")
_QUANTITY = re.compile(r"([+-]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][+-]?\d+)?)\s*([%a-zA-Zµ]*)")


@dataclass(frozen=True)
class Quantity:
    """An amount: a share of the source model's own figure, or absolute.

    Attributes:
        amount: The number; for ``%`` the percentage (50.0 is a half).
        unit: ``%``, ``B`` (bytes), ``s`` (seconds) or empty (a count).
    """

    amount: float
    unit: Unit

    @property
    def relative(self) -> bool:
        """Whether this is a share of the source model's own figure."""
        return self.unit == "%"

    def of(self, reference: float | None) -> float:
        """The absolute amount, given the source model's own figure.

        Args:
            reference: The source model's figure in the same unit; only a percentage needs it.

        Returns:
            The amount in bytes, seconds or as a count.

        Raises:
            BudgetError: A percentage without a reference.
        """
        if not self.relative:
            return self.amount
        if reference is None:
            raise BudgetError(f"{self} of an unknown figure", hint="give an absolute amount")
        return self.amount * reference / 100.0

    def bytes_of(self, reference: int | None) -> int:
        """`of`, rounded down to whole bytes."""
        return math.floor(self.of(reference))

    def __str__(self) -> str:
        if self.unit == "B":
            return _bytes_text(self.amount)
        return f"{_number_text(self.amount)}{self.unit}"


@dataclass(frozen=True)
class _Rule:
    unit: Unit
    meaning: str
    zero: bool = False  # whether zero is a sensible request


_RULES: Final[Mapping[str, _Rule]] = {
    "memory": _Rule("B", "peak bytes of a training step"),
    "relus": _Rule("", "element-wise non-linearities evaluated", zero=True),
    "relu_sites": _Rule("", "calls of non-linearities", zero=True),
    "pi_latency": _Rule("s", "latency of private inference"),
    "levels": _Rule("", "multiplicative levels along a path"),
    "flops": _Rule("", "FLOPs of one forward"),
    "params": _Rule("", "parameters"),
    "bytes": _Rule("B", "bytes of the parameters"),
    "weights": _Rule("", "weights that are not masked"),
    "latency": _Rule("s", "latency of one forward"),
    "gradient_error": _Rule("", "relative gradient error", zero=True),
}
_CHOICES: Final[Mapping[str, tuple[str, ...]]] = {
    "memory_scope": ("activations", "step"),
    "protocol": ("crypten", "cheetah", "semi2k", "aby3", "gc", "ckks"),
    "network": ("lan", "wan"),
}


@dataclass(frozen=True)
class Budget:
    """What the optimised module may take; absent fields are not limited.

    Every field accepts text (``"50%"``, ``"2GiB"``, ``"1.2e9"``, ``"50_000"``), a plain number
    (absolute: bytes, seconds or a count), or a `Quantity`.

    Attributes:
        memory: Peak bytes of one forward and backward above parameters, gradients and inputs.
        memory_scope: ``activations`` (default), or ``step``: parameters, gradients and optimizer
            state count too.
        relus: Element-wise non-linearities evaluated per example.
        relu_sites: Calls of non-linearities that evaluate any.
        pi_latency: Seconds of one private inference: communication, as predicted.
        levels: Multiplicative levels along every path, under homomorphic encryption.
        protocol: Under which protocol: ``crypten`` (default), ``cheetah``, ``semi2k``, ...
        network: ``lan`` (default), ``wan``, or ``bits a second,round-trip seconds``.
        flops: FLOPs of one forward (a multiply-add is 2).
        params: Number of parameters.
        weights: Number of weights that are not masked, of those that products read.
        latency: Seconds of one forward.
        gradient_error: Allowed ``||g - g_exact|| / ||g_exact||``; absent means exact.

    Raises:
        BudgetError: A value that can't be read or makes no sense.
    """

    memory: Quantity | None = None
    memory_scope: str | None = None
    relus: Quantity | None = None
    relu_sites: Quantity | None = None
    pi_latency: Quantity | None = None
    levels: Quantity | None = None
    protocol: str | None = None
    network: str | None = None
    flops: Quantity | None = None
    params: Quantity | None = None
    bytes: Quantity | None = None
    weights: Quantity | None = None
    latency: Quantity | None = None
    gradient_error: Quantity | None = None

    MODIFIERS: ClassVar[tuple[str, ...]] = (
        "memory_scope",
        "gradient_error",
        "protocol",
        "network",
    )

    def __post_init__(self) -> None:
        for name, value in self._raw():
            if value is not None:
                object.__setattr__(self, name, read_field(name, value))

    def _raw(self) -> Iterator[tuple[str, Any]]:
        for field in dataclasses.fields(self):
            yield field.name, getattr(self, field.name)

    @classmethod
    def parse(cls, source: Budget | str | Mapping[str, Any] | None) -> Budget:
        """Read a budget.

        Args:
            source: A budget, text such as ``"memory=50%,flops=1e9"``, a mapping of fields, or
                None for the empty budget.

        Returns:
            The budget.

        Raises:
            BudgetError: Unknown field (with the closest known one), malformed or senseless value.
        """
        if source is None:
            return cls()
        if isinstance(source, Budget):
            return source
        if isinstance(source, str):
            source = _pairs(source)
        if not isinstance(source, Mapping):
            raise BudgetError(
                f"a budget is text or a mapping, not {type(source).__name__}",
                hint="for example 'memory=50%'",
            )
        for name in source:
            check_field(str(name))
        fields: dict[str, Any] = {str(name): value for name, value in source.items()}
        return cls(**fields)

    def items(self) -> dict[str, Quantity | str]:
        """The fields that are set, in the order of declaration."""
        return {name: value for name, value in self._raw() if value is not None}

    def limits(self) -> dict[str, Quantity]:
        """The fields that limit something and so ask for a pass (modifiers left out)."""
        return {
            name: value
            for name, value in self.items().items()
            if name not in self.MODIFIERS and isinstance(value, Quantity)
        }

    def to_dict(self) -> dict[str, str]:
        """JSON-able form; `parse` reads it back."""
        return {name: str(value) for name, value in self.items().items()}

    def __bool__(self) -> bool:
        return bool(self.items())

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.items().items())


def field_names() -> tuple[str, ...]:
    """Names of all budget fields."""
    return (*_RULES, *_CHOICES)


def check_field(name: str) -> None:
    """Raise `BudgetError` with a suggestion if there is no such budget field."""
    if name not in _RULES and name not in _CHOICES:
        known = ", ".join(field_names())
        raise BudgetError(
            f"unknown budget field {name!r}", hint=suggest(name, field_names()) or f"known: {known}"
        )


def read_field(name: str, value: Any) -> Quantity | str:
    """Read and check one budget field.

    Raises:
        BudgetError: Unknown field, malformed or senseless value.
    """
    check_field(name)
    if name in _CHOICES:
        return _choice(name, value)
    rule = _RULES[name]
    quantity = _quantity(name, value, rule)
    _check_sense(name, quantity, rule)
    return quantity


def _choice(name: str, value: Any) -> str:
    text = str(value).strip().strip('"')  # a pipeline's text quotes what has a comma in it
    if name == "network" and _LINK.fullmatch(text):
        return text
    if text not in _CHOICES[name]:
        raise BudgetError(
            f"{name}={text}: not one of {', '.join(_CHOICES[name])}",
            hint=suggest(text, _CHOICES[name]),
        )
    return text


def _quantity(name: str, value: Any, rule: _Rule) -> Quantity:
    if isinstance(value, Quantity):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise BudgetError(f"{name}={value!r}: a quantity is text or a number")
    if not isinstance(value, str):
        return Quantity(float(value) if isinstance(value, float) else value, rule.unit)
    match = _QUANTITY.fullmatch(value.strip())
    if match is None:
        raise BudgetError(f"{name}={value}: not a quantity", hint=_example(name, rule))
    amount, unit = match[1].replace("_", ""), match[2]
    if unit == "%":
        return Quantity(_whole(float(amount)), "%")
    scale = _SCALES[rule.unit].get(unit.lower()) if unit else 1
    if scale is None:
        raise BudgetError(f"{name}={value}: unknown unit {unit!r}", hint=_example(name, rule))
    if not math.isfinite(float(amount)):
        raise BudgetError(f"{name}={value}: not a finite amount")
    # Decimal: 1.1 kB are 1100 bytes, not 1100.0000000000002.
    return Quantity(_whole(float(Decimal(amount) * Decimal(str(scale)))), rule.unit)


def _check_sense(name: str, quantity: Quantity, rule: _Rule) -> None:
    text = f"{name}={quantity}"
    if not quantity.relative and quantity.unit != rule.unit:
        raise BudgetError(f"{text}: {name} counts {rule.meaning}", hint=_example(name, rule))
    if not math.isfinite(quantity.amount):
        raise BudgetError(f"{text}: not a finite amount")
    if quantity.amount < 0:
        raise BudgetError(f"{text}: a budget can't be negative", hint=_example(name, rule))
    if quantity.amount == 0 and not rule.zero:
        raise BudgetError(f"{text}: a budget of zero can't be met", hint=_example(name, rule))
    if quantity.relative and quantity.amount > 100:
        raise BudgetError(
            f"{text}: more than the source model takes",
            hint="a percentage is a share of the source model's own figure, at most 100%",
        )
    counts = rule.unit in ("", "B") and name != "gradient_error"
    if counts and not quantity.relative and 0 < quantity.amount < 1:
        raise BudgetError(
            f"{text}: less than one {'byte' if rule.unit == 'B' else 'whole unit'}",
            hint=f"for a share write {name}={_number_text(round(quantity.amount * 100, 9))}%",
        )


def _pairs(text: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            known = suggest(name, field_names()) if name else None
            raise BudgetError(
                f"malformed budget {text!r}: {part.strip()!r} is not NAME=AMOUNT",
                hint=known or "for example memory=50% or memory=2GiB,flops=1e9",
            )
        check_field(name)
        if name in pairs:
            raise BudgetError(f"malformed budget {text!r}: {name} is given twice")
        pairs[name] = value
    return pairs


def _example(name: str, rule: _Rule) -> str:
    absolute = {"B": "2GiB", "s": "5ms", "": "1.2e9"}[rule.unit]
    if name == "gradient_error":
        absolute = "0.05"
    return f"for example {name}=50% or {name}={absolute}"


def _whole(amount: float) -> float:
    return int(amount) if math.isfinite(amount) and amount == int(amount) else amount


def _number_text(amount: float) -> str:
    return repr(_whole(amount))


def _bytes_text(amount: float) -> str:
    for prefix, power in (("Ti", 40), ("Gi", 30), ("Mi", 20), ("Ki", 10)):
        if amount and amount % (1 << power) == 0:
            return f"{_number_text(amount / (1 << power))}{prefix}B"
    return f"{_number_text(amount)}B"

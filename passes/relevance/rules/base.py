"""What a rule is."""

from __future__ import annotations

import dataclasses
import functools
import typing
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.errors import UsageError, suggest
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.site import Site

Stabiliser = Literal["rms", "sign", "unsigned", "clip"]
"""What moves a sum away from zero, see `Site.stabilised`."""

WEIGHTED = (Family.LINEAR, Family.CONV)
SUMS = (Family.ADD, Family.SCALE, Family.REDUCE, Family.POOL, Family.STATISTIC)

RULES: dict[str, type[Rule]] = {}
"""All rules by the name that composites use."""


@dataclass(frozen=True)
class Rule:
    """How relevance at the result of an operation is shared among what it was computed from.

    Rules are frozen dataclasses whose fields are their options.

    Attributes:
        name: The rule's name in composites (a class variable).
        families: The families of operators that it is for, or none: for all (a class variable).
        needs_quotients: Whether it can do nothing with relevance itself (a class variable).

    Raises:
        UsageError: An option has a value that it can't have.
    """

    name: ClassVar[str] = ""
    families: ClassVar[tuple[Family, ...]] = ()
    needs_quotients: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            RULES[cls.name] = cls

    def __post_init__(self) -> None:
        for name, kind in _kinds(type(self)).items():
            _check(self.name, name, getattr(self, name), kind)

    @property
    def folds(self) -> bool:
        """Whether it has to see the weights that a batch norm behind the layer leads to."""
        return False

    def prepare(self, site: Site) -> Any:
        """What `propagate` needs of the inputs besides what is kept anyway (``site.prepared``)."""
        return None

    def propagate(self, site: Site) -> None:
        """Hand on what has arrived at an operation, and book what stays."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.options().items())
        return f"{self.name}({given})" if given else self.name


@functools.cache
def _kinds(cls: type[Rule]) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _check(rule: str, name: str, value: Any, kind: Any) -> None:
    """Refuse a value that isn't of the kind that an option is declared to be."""
    wrong = UsageError(f"the rule {rule!r} can't have {name} = {value!r}")
    if typing.get_origin(kind) is Literal:
        known = [str(v) for v in typing.get_args(kind)]
        if value not in known:
            hint = suggest(str(value), known) or f"known: {', '.join(known)}"
            raise UsageError(wrong.message, hint=hint)
    elif kind is bool or kind is str:
        if not isinstance(value, kind):
            raise wrong
    elif kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or value != value or (name in ("eps", "gamma") and value < 0):
            raise wrong


class ByWeights(Rule):
    """A rule for layers with weights that looks at them, or at their signs, one by one.

    A batch norm behind the layer changes the weights that act, and is folded into them.
    """

    families: ClassVar[tuple[Family, ...]] = WEIGHTED

    @property
    def folds(self) -> bool:
        """It sees the weights that act."""
        return True

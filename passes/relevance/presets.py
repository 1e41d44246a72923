"""The composites that come with graphopt."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.errors import UsageError, suggest
from graphopt.passes.relevance.composite import Composite, Match, matches
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.rules import (
    AlphaBeta,
    AttnLRP,
    CPAttention,
    DetachedNorm,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Identity,
    Proportional,
    Route,
    Rule,
    SoftmaxTaylor,
    Uniform,
    WinnerTakesAll,
    ZBox,
    ZPlus,
)

_WEIGHTED = (Family.LINEAR, Family.CONV)
_SUMS = (Family.ADD, Family.SCALE, Family.REDUCE, Family.POOL, Family.STATISTIC)


def _conservative(name: str) -> Composite:
    """Relevance goes through values; attention and gates only weigh them."""
    return Composite(
        name,
        (
            matches([Family.ROUTE], Route()),
            matches([Family.MAX], WinnerTakesAll()),
            matches(_SUMS, Proportional()),
            matches([Family.ACTIVATION], Identity()),
            matches([Family.NORM], DetachedNorm()),
            matches([Family.PRODUCT], Uniform(gates="stop")),
            matches([Family.ATTENTION], CPAttention()),
            matches([Family.SOFTMAX], SoftmaxTaylor()),
            matches(_WEIGHTED, Epsilon()),
        ),
    )


def _shared(name: str) -> Composite:
    """Relevance goes through attention and gates as well."""
    return _conservative(name).before(
        matches([Family.PRODUCT], Uniform(gates="share")),
        matches([Family.ATTENTION], AttnLRP()),
    )


def _with(name: str, dense: Rule, conv: Rule, *ahead: tuple[Match, Rule]) -> Composite:
    return _conservative(name).before(
        *ahead, matches([Family.CONV], conv), matches([Family.LINEAR], dense)
    )


def _first(rule: Rule) -> tuple[Match, Rule]:
    return matches(_WEIGHTED, rule, depth="first")


_SMALL = Epsilon(1e-6)

PRESETS: dict[str, Callable[[], Composite]] = {
    "cp-lrp": lambda: _conservative("cp-lrp"),
    "lrp-0": lambda: _shared("lrp-0"),
    "attnlrp": lambda: _shared("attnlrp"),
    "epsilon": lambda: _with("epsilon", _SMALL, _SMALL).before(
        matches([Family.ADD, Family.REDUCE, Family.POOL], Proportional(eps=1e-6))
    ),
    "epsilon-plus": lambda: _with("epsilon-plus", _SMALL, ZPlus()),
    "epsilon-plus-flat": lambda: _with("epsilon-plus-flat", _SMALL, ZPlus(), _first(Flat())),
    "epsilon-gamma-box": lambda: _with("epsilon-gamma-box", _SMALL, Gamma(0.25), _first(ZBox())),
    "epsilon-alpha2-beta1": lambda: _with("epsilon-alpha2-beta1", _SMALL, AlphaBeta()),
    "epsilon-alpha2-beta1-flat": lambda: _with(
        "epsilon-alpha2-beta1-flat", _SMALL, AlphaBeta(), _first(Flat())
    ),
    "excitation": lambda: _with("excitation", ZPlus(), ZPlus()),
    "dynamic": lambda: _shared("dynamic").before(
        matches([Family.ADD, Family.REDUCE], Proportional("absolute"))
    ),
    "gradient-x-input": lambda: Composite(
        "gradient-x-input", (matches([Family.ROUTE], Route()), (Match(), Gradient()))
    ),
}
"""Composites by name; ``cp-lrp`` is the default."""


def composite_of(given: Composite | str) -> Composite:
    """A composite by its name, or as TOML text, or as it is.

    Raises:
        UsageError: There is none of that name; suggests the closest one.
    """
    if isinstance(given, Composite):
        return given
    if given in PRESETS:
        return PRESETS[given]()
    if "\n" in given or "[[" in given:
        return Composite.from_toml(given)
    raise UsageError(
        f"there is no composite {given!r}",
        hint=suggest(given, PRESETS) or f"known: {', '.join(PRESETS)}",
    )

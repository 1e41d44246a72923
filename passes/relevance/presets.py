"""The composites that come with graphopt.

==============================  ====================================================================
``cp-lrp``                      Conservative propagation (Ali et al. 2022): attention, gates and
                                selections only weigh values; the default. In a network of
                                convolutions and ReLU without biases it is gradient times input:
                                take ``epsilon-gamma`` for images.
``cp-lrp-activated``            The same, and the activation of a gated MLP is a constant too
                                (LXT's CP-LRP).
``mamba-lrp``                   Jafari et al. 2024: selections are constants, gates take half.
``attnlrp``, ``lrp-0``          Achtibat et al. 2024: halves at products, Taylor at softmax,
                                epsilon = 0 everywhere.
``epsilon``                     The same with a small epsilon in layers and sums.
``epsilon-plus`` ...            Zennit's of that name, for convolutions and dense layers; all else
                                as in ``cp-lrp``.
``epsilon-gamma``               ``epsilon-gamma-box`` without the box: gamma in the first layer as
                                well, which needs no bounds of the inputs; for images.
``excitation``                  z-plus in all layers (Zhang et al. 2016).
``dynamic``                     The absolute ratios of DynamicLRP (arXiv 2512.07010).
``pattern-attribution``         Kindermans et al. 2018; needs data, as ``pattern-net`` does.
``gradient-x-input``            No rules at all.
==============================  ====================================================================
"""

from __future__ import annotations

from collections.abc import Callable

from graphopt.errors import UsageError, suggest
from graphopt.passes.relevance.composite import Composite, Match, matches
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.rules import (
    AlphaBeta,
    AsGradient,
    AttnLRP,
    CPAttention,
    DetachedNorm,
    Epsilon,
    Flat,
    Gamma,
    Gradient,
    Identity,
    PatternAttribution,
    PatternNet,
    Proportional,
    Route,
    Rule,
    Secant,
    SoftmaxTaylor,
    Uniform,
    WinnerTakesAll,
    ZBox,
    ZPlus,
)
from graphopt.passes.relevance.rules.base import SUMS, WEIGHTED

_WEIGHING = ("attention", "gate", "selection")


def _conservative(name: str) -> Composite:
    """Relevance goes through values; attention and gates only weigh them."""
    return Composite(
        name,
        (
            matches([Family.ROUTE], Route()),
            matches([Family.MAX], WinnerTakesAll()),
            matches(SUMS, Proportional()),
            matches([Family.ACTIVATION], Secant()),
            matches([Family.NORM], DetachedNorm()),
            matches([Family.PRODUCT], Uniform(_WEIGHING)),
            matches([Family.ATTENTION], CPAttention()),
            matches([Family.SOFTMAX], SoftmaxTaylor()),
            matches(WEIGHTED, Epsilon()),
        ),
    )


def _stopping(name: str, *roles: str) -> Composite:
    """Conservative, with other constants in products."""
    return _conservative(name).before(matches([Family.PRODUCT], Uniform(roles)))


def _shared(name: str) -> Composite:
    """Relevance goes through attention and gates as well."""
    return _stopping(name).before(matches([Family.ATTENTION], AttnLRP()))


def _with(name: str, dense: Rule, conv: Rule, *ahead: tuple[Match, Rule]) -> Composite:
    return _conservative(name).before(
        *ahead, matches([Family.CONV], conv), matches([Family.LINEAR], dense)
    )


def _first(rule: Rule) -> tuple[Match, Rule]:
    return matches(WEIGHTED, rule, depth="first")


def _boxed(rule: Rule) -> tuple[Match, Rule]:
    """For pixels: the first layer where it is a convolution."""
    return matches([Family.CONV], rule, depth="first")


def _dynamic() -> Composite:
    return _shared("dynamic").before(
        matches([Family.ADD], Proportional(), op=("index_*", "scatter_*", "_unsafe_index_put")),
        matches([Family.ADD, Family.REDUCE], Proportional("absolute")),
        matches([Family.PRODUCT], Proportional("absolute"), op=("mul", "multiply")),
        matches([Family.POOL], AsGradient(), op=("*adaptive_avg_pool*",)),
        matches([Family.ACTIVATION, Family.NORM], Identity()),
    )


def _patterns(name: str, rule: Rule) -> Composite:
    """Between layers relevance goes as the gradient does; a ReLU that is off lets nothing pass."""
    return _conservative(name).before(
        matches(WEIGHTED, rule),
        matches([Family.ACTIVATION], AsGradient(), op=("relu", "relu6", "leaky_relu", "hardtanh")),
    )


_SMALL = Epsilon(1e-6)

PRESETS: dict[str, Callable[[], Composite]] = {
    "cp-lrp": lambda: _conservative("cp-lrp"),
    "cp-lrp-activated": lambda: _stopping("cp-lrp-activated", *_WEIGHING, "activated"),
    "mamba-lrp": lambda: _stopping("mamba-lrp", "attention", "selection"),
    "lrp-0": lambda: _shared("lrp-0"),
    "attnlrp": lambda: _shared("attnlrp"),
    "epsilon": lambda: _with("epsilon", _SMALL, _SMALL).before(
        matches([Family.ADD, Family.REDUCE, Family.POOL], Proportional(eps=1e-6))
    ),
    "epsilon-plus": lambda: _with("epsilon-plus", _SMALL, ZPlus()),
    "epsilon-plus-flat": lambda: _with("epsilon-plus-flat", _SMALL, ZPlus(), _first(Flat())),
    "epsilon-gamma": lambda: _with("epsilon-gamma", _SMALL, Gamma(0.25)),
    "epsilon-gamma-box": lambda: _with("epsilon-gamma-box", _SMALL, Gamma(0.25), _boxed(ZBox())),
    "epsilon-alpha2-beta1": lambda: _with("epsilon-alpha2-beta1", _SMALL, AlphaBeta()),
    "epsilon-alpha2-beta1-flat": lambda: _with(
        "epsilon-alpha2-beta1-flat", _SMALL, AlphaBeta(), _first(Flat())
    ),
    "excitation": lambda: _with("excitation", ZPlus(), ZPlus()),
    "dynamic": _dynamic,
    "pattern-attribution": lambda: _patterns("pattern-attribution", PatternAttribution()),
    "pattern-net": lambda: _patterns("pattern-net", PatternNet()),
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
    if not isinstance(given, str):
        raise UsageError(
            f"composite={given!r} isn't known", hint="a name, TOML text, or a Composite"
        )
    if given in PRESETS:
        return PRESETS[given]()
    if given.endswith(".toml") and "\n" not in given:
        raise UsageError(
            f"there is no composite {given!r}",
            hint=f"a file's: composite=pathlib.Path({given!r}).read_text()",
        )
    if "\n" in given or "[[" in given:
        return Composite.from_toml(given)
    raise UsageError(
        f"there is no composite {given!r}",
        hint=suggest(given, PRESETS) or f"known: {', '.join(PRESETS)}",
    )

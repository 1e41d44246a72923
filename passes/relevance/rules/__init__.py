"""The rules, by topic; each says how relevance at a result is shared among operands."""

from graphopt.passes.relevance.rules.attention import AttnLRP, CPAttention
from graphopt.passes.relevance.rules.base import RULES, Rule
from graphopt.passes.relevance.rules.elementwise import Identity
from graphopt.passes.relevance.rules.gradient import Gradient, StopGradient
from graphopt.passes.relevance.rules.norms import DetachedNorm
from graphopt.passes.relevance.rules.products import Uniform
from graphopt.passes.relevance.rules.routing import Route, WinnerTakesAll
from graphopt.passes.relevance.rules.softmax import SoftmaxTaylor
from graphopt.passes.relevance.rules.sums import Proportional
from graphopt.passes.relevance.rules.weights import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    WSquare,
    ZBox,
    ZPlus,
)

__all__ = [
    "RULES",
    "AlphaBeta",
    "AttnLRP",
    "CPAttention",
    "DetachedNorm",
    "Epsilon",
    "Flat",
    "Gamma",
    "Gradient",
    "Identity",
    "Proportional",
    "Route",
    "Rule",
    "SoftmaxTaylor",
    "StopGradient",
    "Uniform",
    "WSquare",
    "WinnerTakesAll",
    "ZBox",
    "ZPlus",
]

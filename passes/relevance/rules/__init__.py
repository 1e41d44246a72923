"""The rules, by topic; each says how relevance at a result is shared among operands."""

from graphopt.passes.relevance.rules.attention import AttnLRP, CPAttention
from graphopt.passes.relevance.rules.base import RULES, Rule
from graphopt.passes.relevance.rules.boundary import Flat, WSquare, ZBox
from graphopt.passes.relevance.rules.elementwise import Identity, Secant
from graphopt.passes.relevance.rules.gradient import AsGradient, Gradient, StopGradient
from graphopt.passes.relevance.rules.norms import DetachedNorm, Folded
from graphopt.passes.relevance.rules.patterns import PatternAttribution, PatternNet
from graphopt.passes.relevance.rules.products import Uniform
from graphopt.passes.relevance.rules.routing import Route, WinnerTakesAll
from graphopt.passes.relevance.rules.softmax import SoftmaxTaylor
from graphopt.passes.relevance.rules.sums import Proportional
from graphopt.passes.relevance.rules.weights import AlphaBeta, Epsilon, Gamma, ZPlus

__all__ = [
    "RULES",
    "AlphaBeta",
    "AsGradient",
    "AttnLRP",
    "CPAttention",
    "DetachedNorm",
    "Epsilon",
    "Flat",
    "Folded",
    "Gamma",
    "Gradient",
    "Identity",
    "PatternAttribution",
    "PatternNet",
    "Proportional",
    "Route",
    "Rule",
    "Secant",
    "SoftmaxTaylor",
    "StopGradient",
    "Uniform",
    "WSquare",
    "WinnerTakesAll",
    "ZBox",
    "ZPlus",
]

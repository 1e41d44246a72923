"""Relevance: layer-wise relevance propagation on captured graphs."""

from graphopt.passes.relevance.composite import Composite, Match
from graphopt.passes.relevance.module import ExplainedModule, Explanation
from graphopt.passes.relevance.presets import PRESETS
from graphopt.passes.relevance.relevance import Relevance

__all__ = ["PRESETS", "Composite", "ExplainedModule", "Explanation", "Match", "Relevance"]

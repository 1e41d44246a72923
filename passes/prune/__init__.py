"""Structured pruning: smaller operators that compute what the masked network computes."""

from graphopt.passes.prune.gradual import GradualPruning, gradually
from graphopt.passes.prune.prune import Prune

__all__ = ["GradualPruning", "Prune", "gradually"]

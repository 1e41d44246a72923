"""Structured pruning: smaller operators that compute what the masked network computes."""

from graphopt.passes.prune.gradual import GradualPruning, gradually
from graphopt.passes.prune.iterative import iteratively, schedule
from graphopt.passes.prune.prune import Prune
from graphopt.passes.prune.recovery import recover

__all__ = ["GradualPruning", "Prune", "gradually", "iteratively", "recover", "schedule"]

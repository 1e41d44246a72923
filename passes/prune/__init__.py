"""Pruning: smaller operators that compute what the masked network computes, and masks alone."""

from graphopt.passes.prune.gradual import GradualPruning, gradually
from graphopt.passes.prune.iterative import iteratively, schedule
from graphopt.passes.prune.masks.sparsify import Sparsify
from graphopt.passes.prune.prune import Prune
from graphopt.passes.prune.recovery import recover

__all__ = [
    "GradualPruning",
    "Prune",
    "Sparsify",
    "gradually",
    "iteratively",
    "recover",
    "schedule",
]

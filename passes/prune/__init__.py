"""Pruning: smaller operators that compute what the masked network computes, and masks alone."""

from graphopt.passes.prune.masks.sparsify import Sparsify
from graphopt.passes.prune.prune import Prune

__all__ = ["Prune", "Sparsify"]

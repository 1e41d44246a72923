"""Masks: weights that are zero, in operators of the sizes that they had."""

from graphopt.passes.prune.masks.export import save_masks, semi_structured, sparse_csr
from graphopt.passes.prune.masks.training import keep_masked

__all__ = ["keep_masked", "save_masks", "semi_structured", "sparse_csr"]

"""The view of a module that engines want: constants folded into its linear operators."""

from __future__ import annotations

from graphopt.private.folding.fold import folded, folded_model

__all__ = ["folded", "folded_model"]

"""The view of a module that engines want: constants folded into its linear operators."""

from __future__ import annotations

from graphopt.private.folding.fold import folded

__all__ = ["folded"]

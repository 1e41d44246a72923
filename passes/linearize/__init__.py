"""Linearization: fewer non-linearities, for private inference."""

from graphopt.passes.linearize.linearize import Linearize

__all__ = ["Linearize"]

"""Rematerialization: a training step, or a forward pass, within a given peak memory."""

from graphopt.passes.rematerialize.rematerialize import Rematerialize

__all__ = ["Rematerialize"]

"""Linearization: fewer non-linearities, for private inference."""

from graphopt.passes.linearize.finetuning import FinetuneReport, finetune
from graphopt.passes.linearize.linearize import Linearize
from graphopt.passes.linearize.pareto import sweep
from graphopt.passes.linearize.points import Point, Sweep

__all__ = ["FinetuneReport", "Linearize", "Point", "Sweep", "finetune", "sweep"]

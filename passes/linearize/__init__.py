"""Linearization: fewer non-linearities, for private inference."""

from graphopt.passes.linearize.finetuning import FinetuneReport, finetune
from graphopt.passes.linearize.linearize import Linearize

__all__ = ["FinetuneReport", "Linearize", "finetune"]

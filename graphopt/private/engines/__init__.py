"""Engines that run a circuit between real parties."""

from __future__ import annotations

from graphopt.private.engines.run import Measured, Run

__all__ = ["Measured", "Run"]

"""Engines that run a circuit between parties: `crypten` and `spu`."""

from __future__ import annotations

from graphopt.private.engines import crypten, spu
from graphopt.private.engines.run import Measured, Run

__all__ = ["Measured", "Run", "crypten", "spu"]

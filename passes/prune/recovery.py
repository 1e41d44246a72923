"""Brief recovery of a pruned module: its vectors and its head, not its matrices."""

from __future__ import annotations

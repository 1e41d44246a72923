"""Memory-sharing backward: less saved for the backward pass."""

from graphopt.passes.share.share import Share

__all__ = ["Share"]

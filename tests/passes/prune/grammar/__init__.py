"""The operators that generated models are put together from; importing this declares them."""

from tests.passes.prune.grammar import attention, elementwise, layers, shapes

__all__ = ["attention", "elementwise", "layers", "shapes"]

"""Models that the tests share.

``ZOO[name]`` is a :class:`~tests.zoo.registry.ZooModel`; called, it gives
``(model, args, kwargs)``.
"""

from tests.zoo import control, pretrained, sequence, structure, vision
from tests.zoo.registry import ZOO, ZooModel, floating_leaves, plain_loss, probe_loss

__all__ = [
    "ZOO",
    "ZooModel",
    "control",
    "floating_leaves",
    "plain_loss",
    "pretrained",
    "probe_loss",
    "sequence",
    "structure",
    "vision",
]

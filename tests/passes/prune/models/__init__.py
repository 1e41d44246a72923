"""Small models of many kinds, with random parameters and buffers, that pruning is tried on.

``MODELS[name](batch)`` gives ``(model, args)``: nothing in a model is zero or one by
initialisation, running variances are positive, and the model is in eval mode.
"""

import importlib.util

from tests.passes.prune.models import attention, convolutions, library, mixers, sharing
from tests.passes.prune.models.kinds import MODELS, mlp, randomise
from tests.passes.prune.models.mixers import GatedMLP
from tests.passes.prune.models.sharing import TiedAutoencoder

if importlib.util.find_spec("transformers") is None:
    for name in [name for name, each in MODELS.items() if each.hf]:
        del MODELS[name]

__all__ = [
    "MODELS",
    "GatedMLP",
    "TiedAutoencoder",
    "attention",
    "convolutions",
    "library",
    "mixers",
    "mlp",
    "randomise",
    "sharing",
]

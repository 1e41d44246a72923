"""Rules of the operators, one file a family; importing this package registers them."""

from graphopt.passes.prune.rules import (  # noqa: F401
    fourier,
    moments,
    norms,
    pointwise,
    products,
    recurrent,
    reductions,
    selection,
    shapes,
    spatial,
)

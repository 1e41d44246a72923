"""FLOPs, bytes and seconds of a graph's nodes; symbolic where a size is free."""

from graphopt.cost.allocator import MemoryTrace, trace_memory
from graphopt.cost.flops import FlopCounter, flops, graph_flops, symbolic_flops
from graphopt.cost.models import (
    COST_MODELS,
    AnalyticCost,
    CostModel,
    FlopsCost,
    ProfiledCost,
    analytic,
    cost_model,
    profiled,
)
from graphopt.cost.operators import (
    OpMeasurement,
    measure_ops,
)
from graphopt.cost.sizes import (
    Substitution,
    UnknownSizeError,
    bytes_moved,
    concrete,
    output_bytes,
)

__all__ = [
    "COST_MODELS",
    "AnalyticCost",
    "CostModel",
    "FlopCounter",
    "FlopsCost",
    "MemoryTrace",
    "OpMeasurement",
    "ProfiledCost",
    "Substitution",
    "UnknownSizeError",
    "analytic",
    "bytes_moved",
    "concrete",
    "cost_model",
    "flops",
    "graph_flops",
    "measure_ops",
    "output_bytes",
    "profiled",
    "symbolic_flops",
    "trace_memory",
]

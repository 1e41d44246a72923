"""FLOPs, bytes and seconds of a graph's nodes; symbolic where a size is free."""

from graphopt.cost.allocator import MemoryTrace, trace_memory
from graphopt.cost.operators import (
    OpMeasurement,
    measure_ops,
    measured_op,
    unmeasured,
    workspace_bytes,
)
from graphopt.cost.sizes import (
    Substitution,
    UnknownSizeError,
    bytes_moved,
    concrete,
    output_bytes,
    symbolic_bytes_moved,
    symbolic_output_bytes,
)

__all__ = [
    "MemoryTrace",
    "OpMeasurement",
    "Substitution",
    "UnknownSizeError",
    "bytes_moved",
    "concrete",
    "measure_ops",
    "measured_op",
    "output_bytes",
    "symbolic_bytes_moved",
    "symbolic_output_bytes",
    "trace_memory",
    "unmeasured",
    "workspace_bytes",
]

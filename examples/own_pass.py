"""A pass of one's own: replaces every exact GELU by its tanh approximation.

A package would register it with an entry point, and `graphopt passes` would list it:

    [project.entry-points."graphopt.passes"]
    fast-gelu = "mypackage:FastGelu"
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

import graphopt
from graphopt.ir.graphs import bind_graph
from graphopt.ir.program import Program
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves


@dataclass(frozen=True)
class FastGelu(Pass):
    """gelu(x) -> gelu(x, approximate="tanh")."""

    name: ClassVar[str] = "fast-gelu"
    position: ClassVar[int] = Position.FORWARD
    # The verifier holds the pass to this: outputs and gradients within 1 %, shapes exactly.
    preserves: ClassVar[Preserves] = Preserves(outputs=1e-2, gradients=1e-2, buffers=0.0)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Rewrite a copy of the graph; the program itself stays as it is."""
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.module.graph, {}))
        found = 0
        for node in graph.nodes:
            if node.target is torch.ops.aten.gelu.default and not node.kwargs:
                node.kwargs = {"approximate": "tanh"}
                found += 1
        module = bind_graph(fx.GraphModule(program.module, graph), program.module)
        return PassResult(
            program.replace(module=module), found > 0, {"fast-gelu": {"sites": found}}
        )


def main() -> None:
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8), nn.GELU())
    x = torch.randn(4, 8)
    fast = graphopt.optimize(model, example_inputs=(x,), passes=[FastGelu()])
    print(fast.code)
    print(fast.report)
    print(f"largest difference {(fast(x) - model(x)).abs().max():.1e}")


if __name__ == "__main__":
    main()

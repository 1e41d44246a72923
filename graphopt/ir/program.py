"""`Program`: a captured model as a graph, with everything that its emission needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import fx

from graphopt.derived import derived
from graphopt.ir.signature import Signature

if TYPE_CHECKING:
    from graphopt.ir.literals import Literals
    from graphopt.ir.masks import Masks
    from graphopt.ir.module import OptimizedModule
    from graphopt.ir.skeleton import Skeleton
    from graphopt.ir.slices import Slices

Runner = Callable[[list[torch.Tensor]], Sequence[Any]]


@runtime_checkable
class Planner(Protocol):
    """Planned execution of a program (a rematerialization plan, for example).

    A planner is an ordinary object that pickles and deep-copies; ``kind`` names its class in saved
    files.
    """

    kind: str

    def runner(self, module: OptimizedModule, inputs: list[torch.Tensor]) -> Runner | None:
        """What shall run this call: a callable on the flat inputs, or None for the plain graph."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        ...


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran on a program.

    Attributes:
        name: The pass's name.
        spec: The pass with its options, as text that the pipeline parser reads.
        changed: Whether it changed the program.
        report: What it did, JSON-able.
        seconds: How long it took.
    """

    name: str
    spec: str = ""
    changed: bool = True
    report: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Program:
    """A captured model.

    Attributes:
        module: The train-mode graph (pre-dispatch ATen).  One placeholder for each tensor of the
            arguments, ``get_attr`` at the original names, one flat tuple as output.
        eval_module: The eval-mode graph where switching the mode-bearing ops can't express it (a
            branch on ``self.training``), else None.  Shares the parameters.
        signature: Arguments, defaults, trees of inputs and outputs, sizes.
        skeleton: The source's modules at their paths, which hold the parameters and buffers, and
            its other attributes.
        history: One record for each pass that ran.
        planner: Planned execution, or None.
        literals: Whether dtype and device literals follow ``.half()`` and ``.to()``.
        report: What was done (see `graphopt.report`), or None.
        branches: Where there are two graphs: paths of the modules whose mode chooses.
        eval_signature: Where there are two graphs: the signature of the second (its outputs may
            differ), else None.
        slices: Which places of the source's tensors are left, if something was pruned.
        masks: Which weights are zero by choice, if any are.
    """

    module: fx.GraphModule
    eval_module: fx.GraphModule | None
    signature: Signature
    skeleton: Skeleton
    history: tuple[PassRecord, ...] = ()
    planner: Planner | None = None
    literals: Literals | None = None
    report: Any = None
    branches: tuple[str, ...] = ()
    eval_signature: Signature | None = None
    slices: Slices | None = None
    masks: Masks | None = None

    def replace(self, **changes: Any) -> Program:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def specialize(self, training: bool | Mapping[str, bool]) -> fx.GraphModule:
        """The graph with all mode flags fixed; it shares the parameters.

        Args:
            training: One mode for all modules, or a mode for each module path (missing: train).
        """
        from graphopt.ir.mode import specialize

        return specialize(self, training)

    def fake_inputs(self) -> list[torch.Tensor]:
        """The symbolic fake tensors that stand for the placeholders, as traced."""
        return [n.meta["val"] for n in self.module.graph.find_nodes(op="placeholder")]

    def emit(self) -> OptimizedModule:
        """Make an ``nn.Module`` of this program.  It shares the parameters with the program."""
        from graphopt.ir.module import emit

        return emit(self)

    def _repr_html_(self) -> str:
        return derived("program_html", self)

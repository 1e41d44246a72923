"""Canonicalization: the captured graph in the form that other passes expect.

Three rewrites, repeated until nothing changes:

1. *Functionalization.*  An in-place op becomes its functional twin where nobody can tell the
   difference: the memory belongs to a value made in the graph (no input, parameter or buffer), and
   everything that may share it is either not read afterwards or is surely a view that can be
   derived anew.  Otherwise the op stays and the report says why.

       x = conv(...); v = x.view(-1); x.relu_(); return v + 1
       x = conv(...); x1 = relu(x); v1 = x1.view(-1); return v1 + 1

2. *Inlining.*  A ``no_grad`` region is spliced in with its differentiable inputs detached, and an
   ``enable_grad`` region that nothing differentiable enters is spliced in as it is; regions for
   which that would change meaning stay.

       s = no_grad { return x.mean() }        ->        d = x.detach(); s = d.mean()

3. *Dead code.*  Values that nobody reads are dropped; effects and random draws stay, since a draw
   less would change all draws after it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import fx

from graphopt.ir import functionalize, inline
from graphopt.ir.graphs import bind_graph
from graphopt.ir.ops import is_effectful, is_random
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves

if TYPE_CHECKING:
    from graphopt.ir.program import Program


@dataclass
class CanonicalizeReport:
    """Section ``canonicalize``.

    Attributes:
        functionalized: In-place ops that became functional.
        inlined: Regions that were spliced in.
        removed: Dead nodes that were dropped.
        updates: Writes to parameters, buffers and inputs; they are effects and stay.
        kept: Other in-place ops and regions that stay: ``{"node", "op", "reason"}``.
    """

    functionalized: int = 0
    inlined: int = 0
    removed: int = 0
    updates: int = 0
    kept: list[dict[str, str]] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """Whether anything was rewritten."""
        return bool(self.functionalized or self.inlined or self.removed)


@dataclass(frozen=True)
class Canonicalize(Pass):
    """In-place ops to functional ones, regions inlined, dead code dropped.

    Attributes:
        functionalize: Rewrite in-place ops.
        inline: Splice regions in.
        dead_code: Drop dead nodes.
    """

    name: ClassVar[str] = "canonicalize"
    position: ClassVar[int] = Position.CLEANUP
    always: ClassVar[bool] = True
    # A view that is derived anew hands its gradient over at another place, and sums may round
    # differently; values are the same bit for bit.
    preserves: ClassVar[Preserves] = Preserves(gradients=1e-5)

    functionalize: bool = True
    inline: bool = True
    dead_code: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Canonicalize a program's graphs; a program that carries a plan is left as it is."""
        if program.planner is not None:  # the plan was made for exactly this graph
            return PassResult(program, False)
        report = CanonicalizeReport()
        module = self._rewritten(program.module, report)
        evaluated = program.eval_module
        if evaluated is not None:
            evaluated = self._rewritten(evaluated, report)
        if not report.changed:
            return PassResult(program, False, {self.name: report})
        changed = dataclasses.replace(program, module=module, eval_module=evaluated)
        return PassResult(changed, True, {self.name: report})

    def _rewritten(self, module: fx.GraphModule, report: CanonicalizeReport) -> fx.GraphModule:
        copied = copy_module(module)
        canonicalize(copied, report, self)
        return bind_graph(copied, module)


def canonicalize(module: fx.GraphModule, report: CanonicalizeReport, options: Canonicalize) -> None:
    """Rewrite a graph module and its sub-graphs in place, until nothing changes."""
    kept: list[dict[str, str]] = []
    while True:
        before = (report.functionalized, report.inlined, report.removed)
        kept = _once(module, report, options)
        if before == (report.functionalized, report.inlined, report.removed):
            break
    report.updates += sum(entry["reason"].startswith(functionalize.EFFECT) for entry in kept)
    report.kept += [e for e in kept if not e["reason"].startswith(functionalize.EFFECT)]
    module.graph.lint()
    module.recompile()


def _once(
    module: fx.GraphModule, report: CanonicalizeReport, options: Canonicalize
) -> list[dict[str, str]]:
    kept: list[dict[str, str]] = []
    for inner in inline.regions(module):
        kept += _once(inner, report, options)
    if options.inline:
        count, refused = inline.inline_regions(module)
        report.inlined += count
        kept += refused
    if options.functionalize:
        count, refused = functionalize.functionalize(module)
        report.functionalized += count
        kept += refused
    if options.dead_code:
        report.removed += remove_dead_code(module.graph)
    return kept


def remove_dead_code(graph: fx.Graph) -> int:
    """Drop nodes that nobody reads and that have no effect.

    Placeholders, effects (writes, asserts, custom ops that may have one) and random draws stay.

    Returns:
        How many nodes were dropped, ``get_attr`` nodes not counted.
    """
    removed = 0
    for node in reversed(graph.nodes):
        if node.users or node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            graph.erase_node(node)
        elif node.op == "call_function" and not _has_effect(node):
            graph.erase_node(node)
            removed += 1
    return removed


def _has_effect(node: fx.Node) -> bool:
    if not isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        # Arithmetic on sizes and getitem; anything else from torch._C may switch a mode.
        return getattr(node.target, "__module__", None) not in ("_operator", "operator", "math")
    return is_effectful(node) or is_random(node)


def copy_module(module: fx.GraphModule) -> fx.GraphModule:
    """A graph module with copies of the graph and of all sub-graphs, over the same tensors."""
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, copied)
    output = graph.output(result)
    output.meta = dict(module.graph.output_node().meta)
    new = fx.GraphModule(module, graph)
    for node in graph.find_nodes(op="get_attr"):
        inner: Any = getattr(module, str(node.target), None)
        if isinstance(inner, fx.GraphModule):
            setattr(new, str(node.target), copy_module(inner))
    return new

"""`folded`: an optimized module as engines want it, with fewer operations and the same outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from graphopt.errors import UsageError
from graphopt.ir.capture import capture
from graphopt.ir.functionalize import functionalize
from graphopt.ir.graphs import copy_graph
from graphopt.ir.inline import inline_regions
from graphopt.ir.metadata import refreshed
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import Program
from graphopt.private.folding import pays as costs
from graphopt.private.folding.absorb import absorb
from graphopt.private.folding.emit import emit
from graphopt.private.folding.merge import merge
from graphopt.private.folding.push import push
from graphopt.private.folding.read import read
from graphopt.private.folding.sheet import Sheet
from graphopt.private.folding.squares import complete_squares
from graphopt.private.folding.verify import check_exact, check_rounded, inputs_like
from graphopt.private.protocols import Protocol


def folded(
    module: OptimizedModule | Program,
    *,
    protocol: str | Protocol | None = None,
    public: Sequence[str] = (),
) -> OptimizedModule:
    """The module in eval mode with constants folded into its linear operators.

    1. Batch norms and other scales and shifts by known numbers go into the linear operators before
       or after them, through sums, pools and reshapes, where that is exact.
    2. Polynomials of degree two complete the square: one square, and no other product.
    3. Neighbouring linear operators merge where that is exact and pays.

    What can't be folded stays.  The view's tensors are its own; folded ones bear the source's names
    where these are free.  It is compared with the module before it is handed out.

    Args:
        module: The module, which stays as it is, or a program.
        protocol: Decides by this protocol's rounds and bytes which operators merge; default: those
            that cost no multiply-adds more.
        public: Names of parameters and buffers that both parties know, with ``*``: nothing secret
            goes into these.

    Raises:
        UsageError: There is no such protocol.
        VerificationError: The view computes something else, on random inputs.
    """
    program = module.program if isinstance(module, OptimizedModule) else module
    pays = costs.in_products if protocol is None else costs.under(protocol)
    source = _plain(program)
    signature = program.eval_signature or program.signature
    inputs = inputs_like(signature, source.graph)
    view = refreshed(emit(_rewritten(source, pays, tuple(public)), program))
    exact = emit(_rewritten(source, pays, tuple(public)), program, double=True)
    check_exact(source, exact.module, inputs)
    check_rounded(source, view.module, inputs)
    result = view.emit()
    result.eval()
    return result


def folded_model(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    protocol: str | Protocol | None,
    public: Sequence[str] = (),
) -> OptimizedModule:
    """`folded` for any model; one that isn't captured yet is, with the example's sizes.

    Raises:
        UsageError: A graph module, which has no modules and signature.
    """
    if isinstance(model, OptimizedModule | Program):
        return folded(model, protocol=protocol, public=public)
    if isinstance(model, fx.GraphModule):
        raise UsageError("a graph module can't be folded", hint="give a model or a program")
    program = capture(model, tuple(args), dict(kwargs), dynamic=None)
    return folded(program, protocol=protocol, public=public)


def _rewritten(source: fx.GraphModule, pays: costs.Pays, public: tuple[str, ...]) -> Sheet:
    """The sheet of a graph after all rules."""
    sheet = read(copy_graph(source))
    sheet.public = public
    complete_squares(sheet)
    while absorb(sheet) + merge(sheet, pays) + push(sheet):
        sheet.sweep()
    return sheet


def _plain(program: Program) -> fx.GraphModule:
    """The eval-mode graph without in-place ops and regions where these can be avoided."""
    copied = copy_graph(program.specialize(False))
    while inline_regions(copied)[0] + functionalize(copied)[0]:
        pass
    copied.recompile()
    return copied

"""A folded program against the one that it was made of, on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import RunError, VerificationError
from graphopt.ir.align import all_graphs
from graphopt.ir.graphs import arguments, assign, copy_graph, get_argument, lookup, set_argument
from graphopt.ir.interpret import held_in, interpret
from graphopt.ir.randomness import kept_random_state
from graphopt.ir.signature import Signature
from graphopt.ir.untouched import autocast_off

aten = torch.ops.aten

EXACT = 1e-10
"""Largest error in float64, relative to the largest magnitude of an output."""
ROUNDED = {torch.float64: EXACT, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 5e-3}
"""Largest relative error by dtype; more where the source's own rounding is larger."""
_TIMES = 4.0


# Calls that hand integers on as they are.
_HANDING_ON = {
    aten._to_copy, aten.to, aten.clone, aten.contiguous, aten.detach, aten.view, aten.reshape,
    aten.slice, aten.select, aten.unsqueeze, aten.squeeze, aten.flatten, aten.expand,
    aten.transpose, aten.permute,
}  # fmt: skip


def inputs_like(signature: Signature, graph: fx.Graph) -> list[Tensor]:
    """Random inputs of the example's shapes: normal ones, and integers.

    Integers are below the rows of each embedding that reads them, so that few are equal; else zeros
    and ones.
    """
    generator = torch.Generator().manual_seed(0)
    result = []
    for leaf, node in zip(signature.inputs, graph.find_nodes(op="placeholder"), strict=True):
        if leaf.dtype.is_floating_point:
            drawn = torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
        else:
            most = 2 if leaf.dtype is torch.bool else min(_rows(node), default=2)
            drawn = torch.randint(0, most, leaf.shape, generator=generator)
        result.append(drawn.to(leaf.dtype).to(leaf.device))
    return result


def _rows(ids: fx.Node) -> list[int]:
    """Rows of each table that integers are looked up in; 2 where they go anywhere else."""
    found, stack = [], [ids]
    while stack:
        node = stack.pop()
        for user in node.users:
            packet = getattr(user.target, "overloadpacket", None)
            if packet in _HANDING_ON:
                stack.append(user)
            elif packet is aten.embedding and user.args[1] is node:
                table = user.args[0]
                assert isinstance(table, fx.Node)
                found.append(int(table.meta["val"].shape[0]))
            elif user.op == "call_function" and "sym_size" not in str(user.target):
                found.append(2)
    return found


def check_exact(source: fx.GraphModule, view: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Compare two graphs in float64, where rounding is no excuse.

    A source that can't run in float64, since it insists on another dtype, isn't compared; one that
    computes in float32 inside is compared as closely as that allows.

    Raises:
        VerificationError: They differ.
    """
    given = [_double(x) for x in inputs]
    try:
        want = _run(_doubled(source), given)
    except RunError as error:
        if not isinstance(error.__cause__, RuntimeError):
            raise
        return
    worst = _worst(want, _run(_doubled(view), given))
    limit = ROUNDED[torch.float32] if _rounds(source) else EXACT
    if worst > limit:
        raise _differs(worst, limit, torch.float64)


def _rounds(module: fx.GraphModule) -> bool:
    """Whether a graph asks for a floating dtype whatever its own is."""
    return any(
        isinstance(value, torch.dtype) and value.is_floating_point
        for inner in all_graphs(module)
        for node in inner.graph.nodes
        for place, value in arguments(node)
        if place not in node.meta.get("ties", {})
    )


def check_rounded(source: fx.GraphModule, view: fx.GraphModule, inputs: Sequence[Tensor]) -> None:
    """Compare two graphs as they are.

    Raises:
        VerificationError: They differ by more than rounding.
    """
    want, got = _run(source, inputs), _run(view, inputs)
    dtypes = [w.dtype for w in want if isinstance(w, Tensor) and w.is_floating_point()]
    for dtype in sorted(set(dtypes), key=str):
        chosen = [i for i, w in enumerate(want) if isinstance(w, Tensor) and w.dtype is dtype]
        worst = _worst([want[i] for i in chosen], [got[i] for i in chosen])
        limit = ROUNDED.get(dtype, EXACT)
        if worst > limit:
            exact = _run(_doubled(source), [_double(x) for x in inputs])
            limit = max(
                limit, _TIMES * _worst([exact[i] for i in chosen], [want[i] for i in chosen])
            )
        if worst > limit:
            raise _differs(worst, limit, dtype)


def _differs(worst: float, limit: float, dtype: torch.dtype) -> VerificationError:
    return VerificationError(
        f"the folded view differs from the module by {worst:.2g} of the largest output, more than "
        f"{limit:.2g} ({dtype})",
        claim="outputs",
        hint="this is a fault of the folding; the module itself is untouched",
    )


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().double() if floating else value


def _doubled(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph with float64 tensors, and with that dtype where it follows them."""
    copied = copy_graph(module)
    for node in copied.graph.nodes:
        if node.op == "get_attr":
            assign(copied, str(node.target), _double(lookup(module, str(node.target))))
        for place, tie in node.meta.get("ties", {}).items():
            if tie.kind == "dtype" and get_argument(node, place).is_floating_point:
                set_argument(node, place, torch.float64)
    return copied


def _run(module: fx.GraphModule, inputs: Sequence[Tensor]) -> list[Any]:
    """Outputs of a graph; what it writes to, it writes to copies of."""
    held: dict[str, Any] = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = lookup(module, str(node.target))
        held[str(node.target)] = value.detach().clone() if isinstance(value, Tensor) else value
    with torch.no_grad(), autocast_off(), kept_random_state():
        torch.manual_seed(0)
        return list(interpret(module.graph, inputs, held_in(held)))


def _worst(want: Sequence[Any], got: Sequence[Any]) -> float:
    """Largest error relative to the largest finite magnitude of the output it is in."""
    worst = 0.0
    for one, other in zip(want, got, strict=True):
        if not isinstance(one, Tensor) or not one.numel():
            continue
        if one.shape != other.shape:
            return float("inf")
        a, b = one.double(), other.double()
        finite = a.isfinite() & b.isfinite()
        if not torch.equal(a.where(~finite, torch.zeros_like(a)).nan_to_num(7.0),
                           b.where(~finite, torch.zeros_like(b)).nan_to_num(7.0)):  # fmt: skip
            return float("inf")
        if bool(finite.any()):
            scale = float(a[finite].abs().max()) or 1.0
            worst = max(worst, float((a - b)[finite].abs().max()) / scale)
    return worst

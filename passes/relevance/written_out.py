"""Operators with a rule for none of what they do, as the calls that they stand for.

Recurrent layers are unrolled into their cells: gates weigh values, so that rules for products see
which is which (Arras et al. 2017).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

State = tuple[Tensor, ...]
Cell = Callable[[Tensor, State, Sequence[Tensor], Tensor | None], State]
"""``(projected input, state, recurrent weights, recurrent bias) -> state``."""


def _lstm_cell(x: Tensor, state: State, weights: Any, bias: Any) -> State:
    hidden, cell = state
    i, f, g, o = (x + F.linear(hidden, weights[0], bias)).chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    hidden = o.sigmoid() * cell.tanh()
    return (F.linear(hidden, weights[1]) if len(weights) > 1 else hidden), cell


def _gru_cell(x: Tensor, state: State, weights: Any, bias: Any) -> State:
    (hidden,) = state
    xr, xz, xn = x.chunk(3, -1)
    hr, hz, hn = F.linear(hidden, weights[0], bias).chunk(3, -1)
    update = xz + hz
    new = (xn + (xr + hr).sigmoid() * hn).tanh()
    # 1 - sigmoid(u) = sigmoid(-u): it is a gate as well
    return (update.neg().sigmoid() * new + update.sigmoid() * hidden,)


def _elman(function: Callable[[Tensor], Tensor]) -> Cell:
    def cell(x: Tensor, state: State, weights: Any, bias: Any) -> State:
        return (function(x + F.linear(state[0], weights[0], bias)),)

    return cell


def _layer(
    cell: Cell, steps: Sequence[Tensor], state: State, params: Sequence[Tensor], biases: bool
) -> tuple[list[Tensor], State]:
    """One direction of one layer over time."""
    bias = params[3] if biases else None
    weights = [params[1], *params[4 if biases else 2 :]]
    seen = []
    for step in steps:
        projected = F.linear(step, params[0], params[2] if biases else None)
        state = cell(projected, state, weights, bias)
        seen.append(state[0])
    return seen, state


def _unrolled(
    cell: Cell,
    x: Tensor,
    state: State,
    params: Sequence[Tensor],
    biases: bool,
    layers: int,
    rate: float,
    training: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """A recurrent layer, as ``aten::lstm.input`` and its like take and give it."""
    if training and rate:
        raise NotImplementedError("dropout")
    directions = 2 if bidirectional else 1
    count = len(params) // (layers * directions)
    steps = list(x.unbind(1 if batch_first else 0))
    finals: list[State] = []
    for layer in range(layers):
        found = []
        for direction in range(directions):
            index = layer * directions + direction
            start = tuple(s.select(0, index) for s in state)
            mine = params[index * count : (index + 1) * count]
            ordered = steps[::-1] if direction else steps
            seen, final = _layer(cell, ordered, start, mine, biases)
            found.append(seen[::-1] if direction else seen)
            finals.append(final)
        steps = [torch.cat(pair, -1) if directions > 1 else pair[0] for pair in zip(*found)]  # noqa: B905
    result = torch.stack(steps, 1 if batch_first else 0)
    return (result, *(torch.stack(parts) for parts in zip(*finals)))  # noqa: B905


def _single(cell: Cell) -> Callable[..., Any]:
    def layer(x: Tensor, state: Tensor, *rest: Any) -> Any:
        return _unrolled(cell, x, (state,), *rest)

    return layer


def _lstm(x: Tensor, state: Sequence[Tensor], *rest: Any) -> Any:
    return _unrolled(_lstm_cell, x, tuple(state), *rest)


def _one_step(cell: Cell, states: int) -> Callable[..., Any]:
    def step(x: Tensor, state: Any, w: Tensor, r: Tensor, b: Any = None, c: Any = None) -> Any:
        given = tuple(state) if states > 1 else (state,)
        result = cell(F.linear(x, w, b), given, [r], c)
        return result if states > 1 else result[0]

    return step


def _lerp(start: Tensor, end: Tensor, weight: Any) -> Tensor:
    return start + weight * (end - start)


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + (a * b if value == 1 else value * (a * b))


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + (a / b if value == 1 else value * (a / b))


def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


def _cumprod(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    steps = list((x if dtype is None else x.to(dtype)).unbind(dim))
    for index in range(1, len(steps)):
        steps[index] = steps[index - 1] * steps[index]
    return torch.stack(steps, dim)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    return torch.stack([a, b]).logsumexp(0)


def _addmv(x: Tensor, matrix: Tensor, vector: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    return (x if beta == 1 else beta * x) + (matrix @ vector) * alpha


def _embedding_bag(
    weight: Tensor,
    indices: Tensor,
    offsets: Tensor,
    _by_frequency: bool = False,
    mode: int = 0,
    _sparse: bool = False,
    weights: Tensor | None = None,
    includes_last: bool = False,
    padding: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    padded = padding is not None and padding >= 0
    if mode == 2 and padded:
        raise NotImplementedError("the largest of rows without those of padding")
    rows = F.embedding(indices, weight)
    counted = torch.ones_like(indices, dtype=weight.dtype)
    if padded:
        counted = (indices != padding).to(weight.dtype)
    if padded or weights is not None:
        rows = rows * (counted if weights is None else counted * weights).unsqueeze(-1)
    starts = offsets[:-1] if includes_last else offsets
    places = torch.arange(indices.shape[0], device=indices.device)
    bags = torch.searchsorted(starts.contiguous(), places, right=True) - 1
    empty = weight.new_zeros(starts.shape[0], weight.shape[1])
    if mode == 2:
        return empty.index_reduce(0, bags, rows, "amax", include_self=False), bags, bags, bags
    total = empty.index_add(0, bags, rows)
    if mode == 1:
        sizes = weight.new_zeros(starts.shape[0]).index_add(0, bags, counted)
        total = total / sizes.clamp(min=1).unsqueeze(-1)
    return total, bags, bags, bags


def _cdist(x: Tensor, y: Tensor, p: float = 2.0, _how: int | None = None) -> Tensor:
    if p == 0:
        raise NotImplementedError("how many elements differ")
    return torch.linalg.vector_norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, dim=-1)


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch.broadcast_tensors(a, b)), dim=0)


def _var_mean(x: Tensor, *args: Any, **kwargs: Any) -> Any:
    mean_args = {"keepdim": args[2]} if len(args) > 2 else {}
    mean_args |= {k: v for k, v in kwargs.items() if k == "keepdim"}
    dims = args[0] if args else kwargs.get("dim")
    return torch.var(x, *args, **kwargs), torch.mean(x, dims, **mean_args)


def _trilinear(a: Tensor, b: Tensor, c: Tensor, *expansions: Sequence[int]) -> Tensor:
    """A product of three, each with dimensions added, summed over some; as ``nn.Bilinear``."""
    *added, summed = expansions[:4]
    for dims, index in zip(added, range(3), strict=True):
        for dim in dims:
            a, b, c = (t.unsqueeze(dim) if i == index else t for i, t in enumerate((a, b, c)))
    return (a * b * c).sum(list(summed))


def _coordinates(size: Any, like: Tensor, aligned: bool) -> Tensor:
    """``size`` places between -1 and 1; the ends are the middles of the outermost if aligned."""
    steps = torch.arange(size, dtype=like.dtype, device=like.device)
    if not aligned:
        return (2 * steps + 1) / size - 1
    return 2 * steps / (size - 1) - 1 if size > 1 else steps


def _affine_grid(theta: Tensor, size: Sequence[Any], aligned: bool) -> Tensor:
    lines = [_coordinates(n, theta, aligned) for n in size[2:]]
    axes = torch.meshgrid(*lines, indexing="ij")[::-1]
    base = torch.stack([*axes, torch.ones_like(axes[0])], -1).flatten(0, -2)
    return torch.matmul(base, theta.transpose(1, 2)).unflatten(1, size[2:])


WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "lstm.input": _lstm,
    "gru.input": _single(_gru_cell),
    "rnn_tanh.input": _single(_elman(torch.tanh)),
    "rnn_relu.input": _single(_elman(torch.relu)),
    "lstm_cell": _one_step(_lstm_cell, 2),
    "gru_cell": _one_step(_gru_cell, 1),
    "rnn_tanh_cell": _one_step(_elman(torch.tanh), 1),
    "rnn_relu_cell": _one_step(_elman(torch.relu), 1),
    "lerp": _lerp,
    "addcmul": _addcmul,
    "addcdiv": _addcdiv,
    "glu": _glu,
    "cumprod": _cumprod,
    "logaddexp": _logaddexp,
    "hypot": _hypot,
    "addmv": _addmv,
    "_trilinear": _trilinear,
    "embedding_bag": _embedding_bag,
    "var_mean": _var_mean,
    "_cdist_forward": _cdist,
    "affine_grid_generator": _affine_grid,
}
"""What an operator (or one overload of it) stands for, with the arguments of its ATen schema."""

LOOKUPS = frozenset({"embedding_bag"})
"""Those of them that look tokens up, which has to be seen before sources are told."""


def written_out(target: Any) -> Callable[..., Any] | None:
    """What an operator stands for, or None."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.partition("::")[2]
    return WRITTEN_OUT.get(f"{name}.{target._overloadname}") or WRITTEN_OUT.get(name)

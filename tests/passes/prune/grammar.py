"""The operators that generated models are put together from."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.generated import WIDTHS, Pick, Step, UnfitError, fitting, operator

# Element by element

_SMOOTH = {
    "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh, "sigmoid": torch.sigmoid,
    "softplus": F.softplus, "cos": torch.cos, "abs": torch.abs, "square": torch.square,
    "elu": F.elu, "leaky": F.leaky_relu, "hardswish": F.hardswish, "mish": F.mish,
    "shifted": lambda x: x + 1, "scaled": lambda x: 0.5 * x, "rsub": lambda x: 1 - x,
    "clamp": lambda x: x.clamp(-1, 0.7), "exp": lambda x: torch.exp(-x.square()),
    "dropout": lambda x: F.dropout(x, 0.3, False), "step": lambda x: x * (x > 0),
    "safe": lambda x: x / (1 + x.abs()), "log": lambda x: torch.log1p(x.abs()),
}  # fmt: skip


@operator
def activation(pick: Pick) -> Step:
    return Step(_SMOOTH[pick.of(sorted(_SMOOTH))], [pick.value()])


@operator
def binary(pick: Pick) -> Step:
    one = pick.value()
    functions = [
        torch.add, torch.mul, torch.sub, torch.maximum, torch.minimum,
        lambda a, b: a / (1 + b.square()), lambda a, b: torch.where(a > 0, a, b),
        lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a + 2 * b.sigmoid(),
    ]  # fmt: skip
    return Step(pick.of(functions), [one, pick.like(one)])


@operator
def gate(pick: Pick) -> Step:
    """Broadcasts what one axis or more are reduced to."""
    place = pick.value()
    axis = pick.axis(place)
    form = pick.of([torch.mul, torch.add, lambda a, b: a * b.sigmoid()])
    made = pick.of([
        lambda x: x.mean(axis, keepdim=True), lambda x: x.amax(axis, keepdim=True),
        lambda x: x.narrow(axis, 0, 1), lambda x: x.sum(axis, keepdim=True) * 0.1,
    ])  # fmt: skip
    return Step(lambda x: form(x, made(x)), [place])


@operator
def bare(pick: Pick) -> Step:
    """A scale, or a bias, along some axes."""
    place = pick.value()
    shape = list(pick.values[place].shape)[1:]
    sizes = [n if pick.yes() else 1 for n in shape]
    if pick.yes():
        while sizes and sizes[0] == 1:
            sizes = sizes[1:]
    form = pick.of([torch.mul, torch.add])
    return Step(lambda x, p: form(x, p), [place], nn.Parameter(torch.ones(sizes)))


# Layers


@operator
def linear(pick: Pick) -> Step:
    place = pick.value()
    layer = nn.Linear(pick.values[place].shape[-1], pick.of(WIDTHS), bias=pick.yes())
    act = pick.of([None, torch.relu_, F.gelu])
    return Step(lambda x, f: act(f(x)) if act else f(x), [place], layer)


@operator
def hidden(pick: Pick) -> Step:
    """A residual block of two layers."""
    place = pick.value()
    width, inner = pick.values[place].shape[-1], pick.of(WIDTHS)
    one, two = nn.Linear(width, inner), nn.Linear(inner, width)
    return Step(lambda x, f, g: x + g(F.gelu(f(x))), [place], one, two)


@operator
def shared(pick: Pick) -> Step:
    """A layer again, on another value or the same."""
    before = pick.of(fitting([s for s in pick.steps if len(s.layers) == 1 and len(s.sources) == 1]))
    like = pick.values[before.sources[0]]
    place = pick.value(like.ndim, size=lambda v: v.shape == like.shape)
    return Step(before.function, [place], *before.layers)


@operator
def transposed_weight(pick: Pick) -> Step:
    """A layer's weight, backwards."""
    layers = [s.layers[0] for s in pick.steps if len(s.layers) == 1]
    layer = pick.of(fitting([f for f in layers if isinstance(f, nn.Linear)]))
    place = pick.value(size=lambda v: v.shape[-1] == layer.out_features)
    return Step(lambda x, f: F.linear(x, f.weight.t()), [place], layer)


@operator
def convolution(pick: Pick) -> Step:
    place = pick.value(3, 4)
    value = pick.values[place]
    a, kernel = value.shape[1], pick.of([1, 3])
    b = pick.of(WIDTHS)
    groups = pick.of([g for g in (1, 1, 2, 3, 4, a) if a % g == 0 and (b % g == 0 or g == a)])
    if groups == a:
        b = a * pick.of([1, 2])
    kind = {3: nn.Conv1d, 4: nn.Conv2d}[value.ndim]
    layer = kind(a, b, kernel, padding=kernel // 2, groups=groups, bias=pick.yes())
    act = pick.of([None, torch.relu_, F.silu])
    return Step(lambda x, f: act(f(x)) if act else f(x), [place], layer)


@operator
def deconvolution(pick: Pick) -> Step:
    place = pick.value(4)
    a, b = pick.values[place].shape[1], pick.of(WIDTHS)
    groups = pick.of([g for g in (1, 2, 4) if a % g == 0 and b % g == 0])
    return Step(
        lambda x, f: f(x), [place], nn.ConvTranspose2d(a, b, 2, 2, groups=groups, bias=pick.yes())
    )


@operator
def norm(pick: Pick) -> Step:
    place = pick.value()
    shape = pick.values[place].shape
    groups = [g for g in (1, 2, 3, 4) if shape[1] % g == 0]
    options = [nn.LayerNorm(shape[-1]), nn.LayerNorm(shape[-1], elementwise_affine=False),
               nn.RMSNorm(shape[-1]), nn.GroupNorm(pick.of(groups), shape[1])]  # fmt: skip
    options.append(nn.LayerNorm(shape[-1], bias=False))
    if len(shape) > 2:
        options.append(nn.LayerNorm(shape[-2:]))
    if len(shape) in (2, 3):
        options.append(nn.BatchNorm1d(shape[1]))
    if len(shape) == 4:
        options += [nn.BatchNorm2d(shape[1]), nn.InstanceNorm2d(shape[1], affine=pick.yes())]
    return Step(lambda x, f: f(x), [place], pick.of(options))


@operator
def norm_by_hand(pick: Pick) -> Step:
    place = pick.value()
    axis = pick.axis(place)
    options = [
        lambda x: x * torch.rsqrt(x.pow(2).mean(axis, keepdim=True) + 0.1),
        lambda x: (x - x.mean(axis, keepdim=True)) / (x.var(axis, keepdim=True) + 0.1).sqrt(),
        lambda x: (x - x.mean(axis, keepdim=True)) / (x.std(axis, keepdim=True) + 1),
        lambda x: F.normalize(x + 0.01, dim=axis, eps=1e-2),
        lambda x: x / (x.norm(dim=axis, keepdim=True) + 1),
    ]
    return Step(pick.of(options), [place])


@operator
def recurrent(pick: Pick) -> Step:
    place = pick.value(3)
    cell, both = pick.of([nn.LSTM, nn.GRU, nn.RNN]), pick.yes()
    more = {"proj_size": 3} if cell is nn.LSTM and pick.of([False, False, True]) else {}
    layer = cell(
        pick.values[place].shape[-1], 6, pick.of([1, 2]), batch_first=True, bidirectional=both,
        bias=pick.yes(), **more,
    )  # fmt: skip
    return Step(lambda x, f: f(x)[0], [place], layer)


@operator
def table(pick: Pick) -> Step:
    """Rows of a table of embeddings, by constant places."""
    place = pick.value()
    length, width = pick.values[place].shape[-2:] if pick.values[place].ndim > 2 else (0, 0)
    if not length:
        raise UnfitError
    return Step(lambda x, f: x + f(torch.arange(length)), [place], nn.Embedding(length + 1, width))


# Attention


@operator
def attention(pick: Pick) -> Step:
    place = pick.value(3)
    width, heads, each = pick.values[place].shape[-1], pick.of([1, 2, 4]), pick.of([2, 4])
    groups = pick.of([g for g in (1, 2, heads) if heads % g == 0])
    q, k, v = (nn.Linear(width, n * each, pick.yes()) for n in (heads, groups, groups))
    out, fused = nn.Linear(heads * each, width), pick.of(["sdpa", "gqa", "written", "repeat"])

    def forward(x: Tensor, q: nn.Module, k: nn.Module, v: nn.Module, out: nn.Module) -> Tensor:
        b, t, _ = x.shape
        query = q(x).view(b, t, heads, each).transpose(1, 2)
        key, value = (f(x).view(b, t, groups, -1).transpose(1, 2) for f in (k, v))
        if fused != "gqa":
            if fused == "repeat":
                key, value = (
                    y[:, :, None].expand(-1, -1, heads // groups, -1, -1).reshape(b, heads, t, each)
                    for y in (key, value)
                )
            else:
                key, value = (y.repeat_interleave(heads // groups, 1) for y in (key, value))
        if fused == "written":
            y = (query @ key.transpose(-2, -1) / math.sqrt(each)).softmax(-1) @ value
        else:
            y = F.scaled_dot_product_attention(query, key, value, enable_gqa=fused == "gqa")
        return x + out(y.transpose(1, 2).reshape(b, t, heads * each))

    return Step(forward, [place], q, k, v, out)


@operator
def module_attention(pick: Pick) -> Step:
    place = pick.value(3, size=lambda v: v.shape[-1] % 2 == 0)
    layer = nn.MultiheadAttention(pick.values[place].shape[-1], 2, batch_first=True)
    weights = pick.yes()
    return Step(lambda x, f: f(x, x, x, need_weights=weights)[0], [place], layer)


@operator
def fused_projection(pick: Pick) -> Step:
    """One layer for three values, taken apart in one of several ways."""
    place = pick.value(3)
    width, heads, each = pick.values[place].shape[-1], 2, pick.of([2, 4])
    form = pick.of(["inner", "outer", "chunk"])

    def forward(x: Tensor, f: nn.Module) -> Tensor:
        b, t, _ = x.shape
        y = f(x)
        if form == "outer":
            q, k, v = y.view(b, t, 3, heads, each).unbind(2)
        elif form == "inner":
            q, k, v = y.view(b, t, heads, 3 * each).chunk(3, -1)
        else:
            q, k, v = (z.view(b, t, heads, each) for z in y.chunk(3, -1))
        weights = torch.einsum("bthd,bshd->bhts", q, k).softmax(-1)
        return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)

    return Step(forward, [place], nn.Linear(width, 3 * heads * each))


@operator
def rotary(pick: Pick) -> Step:
    """Halves, or pairs, of an axis are turned."""
    place = pick.value(size=lambda v: v.shape[-1] % 2 == 0)
    half = pick.values[place].shape[-1] // 2
    paired = pick.yes()

    def forward(x: Tensor) -> Tensor:
        if paired:
            a, b = x[..., ::2], x[..., 1::2]
            return torch.stack([a * 0.6 - b * 0.8, a * 0.8 + b * 0.6], -1).flatten(-2)
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * 0.6 + turned * 0.8

    return Step(forward, [place])


@operator
def product(pick: Pick) -> Step:
    """Activations times activations."""
    place = pick.value(3)
    forms = [
        lambda x: (x @ x.transpose(1, 2)) @ x * 0.1, lambda x: x.transpose(1, 2) @ x * 0.1,
        lambda x: torch.einsum("bij,bkj->bik", x, x) * 0.1,
        lambda x: x.transpose(1, 2).softmax(-1) @ x,
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def pairs(pick: Pick) -> Step:
    """All products of two places of an axis."""
    place = pick.value(2, size=lambda v: v.shape[1] <= 12)
    keep = pick.yes()
    function = lambda x: x[:, :, None] * x[:, None, :]  # noqa: E731
    return Step(lambda x: function(x) if keep else function(x).flatten(1), [place])


@operator
def matrix(pick: Pick) -> Step:
    """A bare matrix from the left or the right, or by einsum."""
    place = pick.value(3)
    _, rows, columns = pick.values[place].shape
    width = pick.of(WIDTHS)
    side = pick.of(["left", "right", "einsum", "heads"])
    if side == "left":
        return Step(lambda x, p: p @ x, [place], nn.Parameter(torch.ones(width, rows)))
    if side == "right":
        return Step(lambda x, p: x @ p, [place], nn.Parameter(torch.ones(columns, width)))
    if side == "einsum":
        p = nn.Parameter(torch.ones(rows, columns, width))
        return Step(lambda x, p: torch.einsum("bij,ijk->bik", x, p), [place], p)
    p = nn.Parameter(torch.ones(columns, 2, width))
    return Step(lambda x, p: torch.einsum("bij,jhk->bhik", x, p), [place], p)


# Shapes


@operator
def cat(pick: Pick) -> Step:
    one = pick.value()
    axis = pick.axis(one)
    two = pick.like(one, axis)
    return Step(lambda *v: torch.cat(v, axis), [one, two] if pick.yes() else [one, two, one])


@operator
def stack(pick: Pick) -> Step:
    one = pick.value(2, 3)
    axis, summed = pick.axis(one), pick.yes()

    def forward(*v: Tensor) -> Tensor:
        y = torch.stack(v, axis)
        return y.sum(axis) if summed else y.flatten(axis, axis + 1)

    return Step(forward, [one, pick.like(one)])


@operator
def halves(pick: Pick) -> Step:
    """Gated units in some form."""
    place = pick.value()
    axis = pick.axis(place)
    if pick.values[place].shape[axis] % 2:
        raise UnfitError
    forms = [
        lambda a, b: a * b.sigmoid(), torch.add, lambda a, b: torch.cat([b, a], axis),
        lambda a, b: torch.cat([a, F.relu(b)], axis), lambda a, b: b,
    ]  # fmt: skip
    form = pick.of(forms)
    if pick.of([False, False, True]):
        return Step(lambda x: F.glu(x, axis), [place])
    return Step(lambda x: form(*x.chunk(2, axis)), [place])


@operator
def split(pick: Pick) -> Step:
    """Uneven parts go different ways."""
    place = pick.value()
    axis = pick.axis(place)
    size = pick.values[place].shape[axis]
    if size < 3:
        raise UnfitError
    at = pick.random.randrange(1, size)
    form = pick.of([
        lambda a, b: torch.cat([b.tanh(), a], axis), lambda a, _: a, lambda _, b: b,
        lambda a, b: torch.cat([a, b, a.relu()], axis),
    ])  # fmt: skip
    return Step(lambda x: form(*x.split([at, size - at], axis)), [place])


@operator
def slice_(pick: Pick) -> Step:
    place = pick.value()
    axis = pick.axis(place)
    size = pick.values[place].shape[axis]
    if size < 2:
        raise UnfitError
    step, start = pick.of([1, 1, 2, 3]), pick.random.randrange(size - 1)
    end = pick.random.randrange(start + 1, size + 1)
    if step > 1 and pick.yes():
        start, end = start % step, size
    index = (slice(None),) * axis + (slice(start, end, step),)
    return Step(lambda x: x[index], [place])


@operator
def overlap(pick: Pick) -> Step:
    """Two windows of one axis meet."""
    place = pick.value()
    axis = pick.axis(place)
    size = pick.values[place].shape[axis]
    if size < 3:
        raise UnfitError
    by = pick.random.randrange(1, size)
    return Step(lambda x: x.narrow(axis, 0, size - by) * x.narrow(axis, by, size - by), [place])


@operator
def reordered(pick: Pick) -> Step:
    """The places of an axis in another order."""
    place = pick.value()
    axis = pick.axis(place)
    size = pick.values[place].shape[axis]
    order = torch.tensor(pick.random.sample(range(size), size))
    some = torch.tensor([pick.random.randrange(size) for _ in range(pick.of(WIDTHS))])
    by = pick.random.randrange(size)
    index = (slice(None),) * axis
    forms = [
        lambda x: x.flip(axis), lambda x: x.roll(by, axis), lambda x: x[(*index, order)],
        lambda x: x.index_select(axis, some), lambda x: x[(*index, some)],
        lambda x: x[(*index, order.tolist())],
    ]  # fmt: skip
    form, residual = pick.of(forms), pick.yes()
    if residual:
        return Step(lambda x: y + x if (y := form(x)).shape == x.shape else y, [place])
    return Step(form, [place])


@operator
def reduced(pick: Pick) -> Step:
    place = pick.value(3, 4, 5)
    axis = pick.axis(place)
    index = pick.random.randrange(pick.values[place].shape[axis])
    forms = [
        lambda x: x.mean(axis), lambda x: x.sum(axis) * 0.2, lambda x: x.amax(axis),
        lambda x: x.select(axis, index), lambda x: x.var(axis), lambda x: x.logsumexp(axis),
        lambda x: x.norm(dim=axis), lambda x: x.unbind(axis)[-1], lambda x: x.max(axis)[0],
        lambda x: torch.cat(torch.var_mean(x, axis, keepdim=True), axis),
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def along(pick: Pick) -> Step:
    place = pick.value()
    axis = pick.axis(place)
    forms = [
        lambda x: x.softmax(axis), lambda x: x.cumsum(axis), lambda x: x.log_softmax(axis),
        lambda x: x.sort(axis)[0], lambda x: x.topk(1, axis)[0], lambda x: x.cumprod(axis),
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def permute(pick: Pick) -> Step:
    place = pick.value(3, 4, 5)
    order = list(range(1, pick.values[place].ndim))
    pick.random.shuffle(order)
    return Step(lambda x: x.permute(0, *order), [place])


@operator
def apart(pick: Pick) -> Step:
    """One axis becomes two, by numbers or by sizes."""
    place = pick.value(2, 3, 4)
    axis = pick.axis(place)
    size = pick.values[place].shape[axis]
    outer = pick.divisor(size)
    literal = pick.yes()

    def forward(x: Tensor) -> Tensor:
        if literal:
            return x.unflatten(axis, (outer, size // outer))
        return x.reshape(*x.shape[:axis], -1, x.shape[axis] // outer, *x.shape[axis + 1 :])

    swapped = pick.of([False, False, True])
    return Step(lambda x: forward(x).transpose(axis, axis + 1) if swapped else forward(x), [place])


@operator
def together(pick: Pick) -> Step:
    place = pick.value(3, 4, 5)
    axis = pick.random.randrange(1, pick.values[place].ndim - 1)
    form = pick.of([lambda x: x.flatten(axis, axis + 1),
                    lambda x: x.transpose(axis, axis + 1).flatten(axis, axis + 1)])  # fmt: skip
    return Step(form, [place])


@operator
def shuffle(pick: Pick) -> Step:
    """Groups of channels are mixed."""
    place = pick.value()
    axis = pick.axis(place)
    groups = pick.divisor(pick.values[place].shape[axis])
    return Step(
        lambda x: x.unflatten(axis, (groups, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1),
        [place],
    )


@operator
def regrouped(pick: Pick) -> Step:
    """Two axes become two others."""
    place = pick.value(3, 4)
    axis = pick.random.randrange(1, pick.values[place].ndim - 1)
    shape = list(pick.values[place].shape)
    total = shape[axis] * shape[axis + 1]
    outer = pick.divisor(total)
    return Step(
        lambda x: x.reshape(*x.shape[:axis], outer, total // outer, *x.shape[axis + 2 :]), [place]
    )


@operator
def pixels(pick: Pick) -> Step:
    place = pick.value(4)
    channels, height, width = pick.values[place].shape[1:]
    if channels % 4 == 0 and pick.yes():
        return Step(lambda x: F.pixel_shuffle(x, 2), [place])
    if height % 2 or width % 2:
        raise UnfitError
    return Step(lambda x: F.pixel_unshuffle(x, 2), [place])


@operator
def pool(pick: Pick) -> Step:
    place = pick.value(3, 4)
    if pick.values[place].ndim == 3:
        forms = [
            lambda x: F.avg_pool1d(x, 2, ceil_mode=True),
            lambda x: F.adaptive_max_pool1d(x, 3),
        ]
        return Step(pick.of(forms), [place])
    forms = [
        lambda x: F.max_pool2d(x, 2, ceil_mode=True), lambda x: F.adaptive_avg_pool2d(x, 2),
        lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
        lambda x: F.unfold(x, 3, padding=1),
        lambda x: F.interpolate(x, size=(4, 4), mode="bilinear"),
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def padded(pick: Pick) -> Step:
    place = pick.value()
    before, after = pick.of([0, 1, 2]), pick.of([0, 1, 3])
    axis = pick.axis(place)
    amounts = [0, 0] * (pick.values[place].ndim - 1 - axis) + [before, after]
    value = pick.of([0.0, 0.0, 1.5])
    return Step(lambda x: F.pad(x, amounts, value=value), [place])


@operator
def repeated(pick: Pick) -> Step:
    place = pick.value(2, 3)
    axis = pick.axis(place)
    rank = pick.values[place].ndim
    times = [3 if i == axis else 1 for i in range(rank)]
    copies = lambda x: x.unsqueeze(axis).expand(*x.shape[:axis], 2, *x.shape[axis:])  # noqa: E731
    forms = [
        lambda x: x.repeat(times), lambda x: x.repeat_interleave(2, axis),
        lambda x: copies(x).flatten(axis, axis + 1), copies,
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def masked(pick: Pick) -> Step:
    """A triangle, a mask made of places, or a constant along an axis."""
    place = pick.value(3, 4)
    rows, columns = pick.values[place].shape[-2:]
    keep = torch.tensor([pick.yes() for _ in range(columns)])
    forms = [
        torch.tril, lambda x: x.masked_fill(torch.ones(rows, columns).triu(1).bool(), 0.0),
        lambda x: x * torch.arange(columns), lambda x: torch.where(keep, x, 0.5),
        lambda x: x + torch.zeros(rows, columns), lambda x: x * torch.linspace(0, 1, rows)[:, None],
    ]  # fmt: skip
    return Step(pick.of(forms), [place])


@operator
def assigned(pick: Pick) -> Step:
    """Part of a tensor is written to."""
    place = pick.value()
    axis = pick.axis(place)

    def forward(x: Tensor) -> Tensor:
        y = x.clone()
        y.narrow(axis, 0, 1).mul_(0.5)
        return y

    return Step(forward, [place])


@operator
def folded(pick: Pick) -> Step:
    """An axis goes into the batch, something happens, and it comes out again."""
    place = pick.value(3)
    width = pick.values[place].shape[-1]
    size = pick.values[place].shape[1]
    layer = nn.Linear(width, pick.of(WIDTHS))
    return Step(
        lambda x, f: f(x.reshape(-1, width)).relu().reshape(-1, size, f.out_features),
        [place],
        layer,
    )

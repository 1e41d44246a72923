"""Operators that join, cut, reorder, and reduce axes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.generated import WIDTHS, Pick, Step, UnfitError, operator


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

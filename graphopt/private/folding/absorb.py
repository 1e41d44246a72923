"""A scale and shift goes back into what makes the value: the preceding linear operators.

    s conv(x) + t  ->  conv'(x)            s (conv(x) + proj(y)) + t  ->  conv'(x) + proj'(y)

The value may have no other reader; through a sum every term takes the scale, and one of them the
shift.  Where the value is itself a scaled and shifted one, both become one.
"""

from __future__ import annotations

from torch import fx

from graphopt.private.folding.affine import Affine
from graphopt.private.folding.read import addends
from graphopt.private.folding.sheet import Sheet, aten
from graphopt.private.folding.through import through


def absorb(sheet: Sheet) -> int:
    """Fold scales and shifts backwards; returns how many went."""
    count = 0
    for node in sheet.nodes():
        form = sheet.affine(node)
        if form is None:
            continue
        data = sheet.data(node)
        inner = sheet.affine(data)
        if not form.scales and not form.shifts:
            sheet.replace(node, data)
        elif inner is not None and sheet.composes(form, inner) and sheet.is_private(data):
            sheet.change(node, form.after(inner), sheet.data(data))
            sheet.sweep()
        elif _takes(sheet, data, form):
            _give(sheet, data, form)
            sheet.replace(node, data)
        else:
            continue
        count += 1
    return count


def _takes(sheet: Sheet, node: fx.Node, form: Affine) -> bool:
    """Whether a value can be scaled and shifted for nothing."""
    if not sheet.is_private(node):
        return False
    linear, affine = sheet.linear(node), sheet.affine(node)
    if linear is not None:
        along = form.axis is None or form.axis == linear.axis
        return along and sheet.takes(linear.sources, form.sources)
    if affine is not None:
        free = not form.scales or (affine.scales and sheet.takes(affine.sources, form.sources))
        return free and sheet.composes(form, affine)
    terms = addends(sheet, node)
    if terms is not None:
        (first, second), _ = terms
        if not form.scales:
            return _takes(sheet, first, form) or _takes(sheet, second, form)
        return first is not second and all(
            _takes(sheet, term, form.only_scale()) for term in (first, second)
        )
    parts = _parts(sheet, node, form)
    if parts is not None:
        return all(_takes(sheet, part, own) for part, own in parts)
    passed = through(sheet, node)
    before = passed and passed.back(form)
    return bool(passed and before and _takes(sheet, passed.data, before))


def _give(sheet: Sheet, node: fx.Node, form: Affine) -> None:
    """Scale and shift a value that takes it."""
    linear, affine = sheet.linear(node), sheet.affine(node)
    if linear is not None:
        sheet.change(node, linear.then(form), sheet.data(node))
        return
    if affine is not None:
        sheet.change(node, form.after(affine), sheet.data(node))
        return
    terms = addends(sheet, node)
    if terms is not None:
        _give_terms(sheet, terms, form)
        return
    parts = _parts(sheet, node, form)
    if parts is not None:
        for part, own in parts:
            _give(sheet, part, own)
        return
    passed = through(sheet, node)
    before = passed and passed.back(form)
    assert passed is not None
    assert before is not None
    _give(sheet, passed.data, before)


def _give_terms(sheet: Sheet, terms: tuple[tuple[fx.Node, fx.Node], float], form: Affine) -> None:
    (first, second), sign = terms
    if form.scales:
        for term in (first, second):
            _give(sheet, term, form.only_scale())
    if form.shifts:
        shift = form.only_shift()
        if _takes(sheet, first, shift):
            _give(sheet, first, shift)
        else:
            negated = shift.along(shift.axis, shift.scale, sign * shift.shift)
            _give(sheet, second, negated)


def _parts(sheet: Sheet, node: fx.Node, form: Affine) -> list[tuple[fx.Node, Affine]] | None:
    """Of a concatenation, what each part gets."""
    if node.target is not aten.cat.default or node in sheet.barred:
        return None
    given = list(node.args[0])  # type: ignore[arg-type]
    rank_ = node.meta["val"].dim()
    axis = (node.args[1] if len(node.args) > 1 else 0) % rank_ - rank_  # type: ignore[operator]
    parts = [p for p in given if isinstance(p, fx.Node)]
    if len({id(p) for p in parts}) != len(given):
        return None
    if any(p.meta["val"].dim() != rank_ or p.meta["val"].dtype != node.meta["val"].dtype
           for p in parts):  # fmt: skip
        return None
    if form.axis != axis:
        return [(part, form) for part in parts]
    found, start = [], 0
    for part in parts:
        size = part.meta["val"].shape[axis]
        here = slice(start, start + size)
        found.append((part, form.along(axis, form.scale[here], form.shift[here])))
        start += size
    return found

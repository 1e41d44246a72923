"""A scale and shift goes on into the linear operators that read the value, as far as is exact.

    conv(s x + t)  ->  conv'(x)                 where conv adds no zeros, or t = 0
    conv(s x + t)  ->  conv'(x + t / s)         else: a product less

All readers have to take it.  Zeros that a convolution adds around ``s x + t`` would have to be
``-t / s`` around x, so that a shift stays in front of such a one.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.private.folding.affine import Affine
from graphopt.private.folding.read import addends, product
from graphopt.private.folding.sheet import Sheet
from graphopt.private.folding.through import through

SHIFT_LIMIT = 64.0
"""Largest ``|t / s|`` and ``1 / |s|`` of a channel whose scale goes on without its shift.

Beyond it, fixed-point numbers would lose more than six of their bits.
"""


def push(sheet: Sheet) -> int:
    """Fold scales and shifts forwards; returns how many went."""
    count = 0
    for node in sheet.nodes():
        form = sheet.affine(node)
        if form is None or not node.users:
            continue
        if _all_take(sheet, node, form):
            _hand_on(sheet, node, form)
            sheet.replace(node, sheet.data(node))
            count += 1
            continue
        alone = _scale_alone(sheet, node, form)
        if alone is not None:
            _hand_on(sheet, node, form.only_scale())
            sheet.change(node, alone, sheet.data(node))
            count += 1
    return count


def _scale_alone(sheet: Sheet, node: fx.Node, form: Affine) -> Affine | None:
    """The shift that is left in front when the scale goes on by itself."""
    if not (form.scales and form.shifts) or not _all_take(sheet, node, form.only_scale()):
        return None
    if not bool((form.scale.abs() * SHIFT_LIMIT >= 1).all()):
        return None
    shift = form.shift / form.scale
    if not bool((shift.abs() <= SHIFT_LIMIT).all()):
        return None
    return form.along(form.axis, torch.ones_like(shift), shift)


def _all_take(sheet: Sheet, node: fx.Node, form: Affine) -> bool:
    """Whether all that read a value take its scale and shift for nothing."""
    if node in sheet.barred or not node.users:
        return False
    return all(_takes(sheet, reader, node, form) for reader in node.users)


def _takes(sheet: Sheet, reader: fx.Node, node: fx.Node, form: Affine) -> bool:
    if reader in sheet.barred or reader.op != "call_function":
        return False
    linear, affine = sheet.linear(reader), sheet.affine(reader)
    if linear is not None:
        along = form.axis is None or form.axis == linear.axis
        free = along and sheet.takes(linear.sources, form.sources)
        return free and not (form.shifts and linear.adds_zeros)
    if affine is not None:
        return affine.fits(form) and _takes_over(sheet, reader, affine, form)
    factors = product(sheet, reader)
    if factors is not None:
        square = _squared(form)
        return factors[0] is factors[1] and not form.shifts and _all_take(sheet, reader, square)
    terms = addends(sheet, reader)
    if terms is not None:
        both = terms[0][0] is terms[0][1]
        return not form.scales and not both and _all_take(sheet, reader, _term(form, node, terms))
    passed = through(sheet, reader)
    after = passed and passed.onward(form)
    return bool(after and _all_take(sheet, reader, after))


def _takes_over(sheet: Sheet, reader: fx.Node, affine: Affine, form: Affine) -> bool:
    """Whether a scale and shift gets no dearer by one before it."""
    if not form.scales:
        return sheet.composes(affine, form)
    if affine.scales:
        return sheet.takes(affine.sources, form.sources)
    return _scale_alone(sheet, reader, affine.after(form)) is not None


def _hand_on(sheet: Sheet, node: fx.Node, form: Affine) -> None:
    """Let all readers of a value scale and shift it themselves."""
    for reader in list(node.users):
        linear, affine = sheet.linear(reader), sheet.affine(reader)
        terms = addends(sheet, reader)
        if linear is not None:
            sheet.change(reader, linear.behind(form), sheet.data(reader))
        elif affine is not None:
            sheet.change(reader, affine.after(form), sheet.data(reader))
        elif product(sheet, reader) is not None:
            _hand_on(sheet, reader, _squared(form))
        elif terms is not None:
            _hand_on(sheet, reader, _term(form, node, terms))
        else:
            passed = through(sheet, reader)
            after = passed and passed.onward(form)
            assert after is not None
            _hand_on(sheet, reader, after)


def _squared(form: Affine) -> Affine:
    """What a scale is behind a square."""
    return form.along(form.axis, form.scale.square(), form.shift)


def _term(form: Affine, node: fx.Node, terms: tuple[tuple[fx.Node, fx.Node], float]) -> Affine:
    """What a shift of one term is of the sum."""
    sign = terms[1] if terms[0][1] is node else 1.0
    return form.along(form.axis, form.scale, sign * form.shift)

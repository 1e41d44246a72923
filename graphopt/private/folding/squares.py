"""Polynomials of degree two with one product: completing the square.

    a2 x^2 + a1 x + a0 = s (r (x + b))^2 + c,
    s = sign a2,  r = sqrt |a2|,  b = a1 / (2 a2),  c = a0 - a1^2 / (4 a2)

Scale and shift in front fold into the preceding linear operator, s and c into the following one.
Under a protocol the one square is left, where the polynomial took a square and two products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.private.folding.affine import Affine, Sources, joined, made, number
from graphopt.private.folding.read import addends, product, square_of
from graphopt.private.folding.sheet import Sheet

OFFSET_LIMIT = 64.0
"""Largest ``a1^2 / (4 |a2|)``: what the square and c have too much of each other.

The sum cancels it, which costs three of the 16 fraction bits of an engine's fixed-point numbers
(the square's error is ``2 sqrt(64) 2^-16``), or six bits of float32.  A ReLU fitted at N(0, d^2)
has 0.31 d.  A site with a channel beyond it (a2 about zero, a channel that is all but affine)
stays as it is; a channel with ``a2 = a1 = 0`` is a constant and does no harm.
"""


@dataclass(frozen=True, eq=False)
class Quadratic:
    """``a2 x^2 + a1 x + a0`` of a node.

    Attributes:
        base: The node x.
        terms: The coefficients by rising power, float64, each ``[]`` or ``[channels]``.
        axis: Axis of the channels, from the end, or None.
        sources: What they are made of.
    """

    base: fx.Node
    terms: tuple[Tensor, Tensor, Tensor]
    axis: int | None
    sources: Sources

    def then(self, affine: Affine) -> Quadratic | None:
        """Scaled and shifted, or None where the channels lie along another axis."""
        if None not in (self.axis, affine.axis) and self.axis != affine.axis:
            return None
        a0, a1, a2 = (term * affine.scale for term in self.terms)
        return self._of((a0 + affine.shift, a1, a2), affine)

    def plus(self, affine: Affine) -> Quadratic | None:
        """Plus a scaled and shifted base."""
        if None not in (self.axis, affine.axis) and self.axis != affine.axis:
            return None
        a0, a1, a2 = self.terms
        return self._of((a0 + affine.shift, a1 + affine.scale, a2), affine)

    def _of(self, terms: tuple[Tensor, Tensor, Tensor], affine: Affine) -> Quadratic:
        a0, a1, a2 = torch.broadcast_tensors(*terms)
        axis = affine.axis if self.axis is None else self.axis
        return Quadratic(self.base, (a0, a1, a2), axis, joined(self.sources, affine.sources))

    def completed(self) -> tuple[Affine, Affine] | None:
        """What goes before and after the square; None where a channel is beyond the limit."""
        a0, a1, a2 = self.terms
        constant = (a2 == 0) & (a1 == 0)
        excess = torch.where(constant, 0.0, a1.square() / (4 * a2.abs()))
        if not bool((excess <= OFFSET_LIMIT).all()):
            return None
        root = a2.abs().sqrt()
        shift = torch.where(constant, 0.0, a1 * a2.sign() / (2 * root))
        sign = torch.where(a2 < 0, -1.0, 1.0).double()
        after = a0 - sign * excess
        return (
            made(root, shift, self.axis, self.sources),
            made(sign, after, self.axis, self.sources),
        )


def complete_squares(sheet: Sheet) -> int:
    """Write polynomials of degree two as one square; returns how many."""
    found = _quadratics(sheet)
    count = 0
    for node, quadratic in reversed(found.items()):
        if node._erased or not node.users or _goes_into_another(sheet, node, found):
            continue
        parts = quadratic.completed()
        if parts is None or not (quadratic.terms[1] != 0).any():
            continue
        before, after = parts
        inner = sheet.add(node, before, quadratic.base)
        squared = square_of(sheet, node, inner)
        outer = sheet.add(node, after, squared)
        sheet.replace(node, outer)
        count += 1
    sheet.sweep()
    return count


def _quadratics(sheet: Sheet) -> dict[fx.Node, Quadratic]:
    """All values that are a polynomial of degree two with a single product in it."""
    found: dict[fx.Node, Quadratic] = {}
    for node in sheet.nodes():
        quadratic = _of_product(sheet, node) or _of_affine(sheet, node, found)
        quadratic = quadratic or _of_sum(sheet, node, found)
        if quadratic is not None:
            found[node] = quadratic
    return found


def _goes_into_another(sheet: Sheet, node: fx.Node, found: dict[fx.Node, Quadratic]) -> bool:
    """Whether the one reader is a larger part of the same polynomial."""
    if not sheet.is_private(node):
        return False
    reader = next(iter(node.users))
    return reader in found and found[reader].completed() is not None


def _of_product(sheet: Sheet, node: fx.Node) -> Quadratic | None:
    factors = product(sheet, node)
    if factors is None:
        return None
    shared = _nearest(sheet, *factors)
    if shared is None:
        return None
    base, first, second = shared
    terms = (
        first.shift * second.shift,
        first.shift * second.scale + first.scale * second.shift,
        first.scale * second.scale,
    )
    a0, a1, a2 = torch.broadcast_tensors(*terms)
    axis = second.axis if first.axis is None else first.axis
    return Quadratic(base, (a0, a1, a2), axis, joined(first.sources, second.sources))


def _of_affine(sheet: Sheet, node: fx.Node, found: dict[fx.Node, Quadratic]) -> Quadratic | None:
    form = sheet.affine(node)
    if form is None:
        return None
    data = sheet.data(node)
    if data not in found or not sheet.is_private(data):
        return None
    if not form.scales and not sheet.takes(found[data].sources, form.sources):
        return None  # public coefficients take in no secret shift
    return found[data].then(form)


def _of_sum(sheet: Sheet, node: fx.Node, found: dict[fx.Node, Quadratic]) -> Quadratic | None:
    terms = addends(sheet, node)
    if terms is None:
        return None
    (first, second), sign = terms
    for square, other, signs in ((first, second, (1.0, sign)), (second, first, (sign, 1.0))):
        if square not in found or not sheet.is_private(square):
            continue
        for base, affine in _chain(sheet, other):
            if base is found[square].base:
                scaled = found[square].then(number(signs[0]))
                return scaled and scaled.plus(number(signs[1]).after(affine))
    return None


def _nearest(sheet: Sheet, one: fx.Node, other: fx.Node) -> tuple[fx.Node, Affine, Affine] | None:
    """The nearest value of which both are scaled and shifted forms, and these.

    The nearest: a weight further off would make public coefficients secret.
    """
    if one is other:
        return one, number(), number()
    for base, first in _chain(sheet, one):
        for same, second in _chain(sheet, other):
            if base is same and first.fits(second):
                return base, first, second
    return None


def _chain(sheet: Sheet, node: fx.Node) -> list[tuple[fx.Node, Affine]]:
    """The value itself, and what it is a scaled and shifted form of by ops that it alone reads."""
    found = [(node, number())]
    while True:
        base, affine = found[-1]
        form = sheet.affine(base)
        if form is None or not sheet.composes(affine, form) or not sheet.is_private(base):
            return found
        found.append((sheet.data(base), affine.after(form)))

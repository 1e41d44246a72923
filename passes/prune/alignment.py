"""Widths that fill vector registers: kernels pad channels to them, so others take as long."""

from __future__ import annotations

from dataclasses import replace

from graphopt.solvers.widths import Allocation, Dimension, WidthProblem

# Single-precision numbers in a vector register, of 512 and of 256 bits.
_STEPS = (16, 8)
# A dimension has at least so many widths left.
_CHOICE = 4
# What aligned widths must keep of the value, and use of the tightest limit, that others would.
_VALUE, _USED = 0.995, 0.985
# How far a width may be from that of a rule, as a share of it.
_FAR = 1 / 8


def vector_step(width: int) -> int:
    """The step at which the widths of a dimension are aligned; 1 for a narrow one."""
    return next((step for step in _STEPS if width >= _CHOICE * step), 1)


def aligned(problem: WidthProblem, full: tuple[int, ...]) -> WidthProblem:
    """The problem with aligned widths.

    Args:
        problem: Dimensions, of which some units may be gone already.
        full: The full widths of the network, which are allowed as they are.
    """
    pairs = zip(problem.dimensions, full, strict=True)
    return replace(problem, dimensions=tuple(_aligned(d, width) for d, width in pairs))


def _aligned(dimension: Dimension, full: int) -> Dimension:
    step, left = vector_step(full), len(dimension.gains)
    most = left if left == full else left - left % step
    lowest = -(-dimension.least // step) * step
    if step == 1 or dimension.most is not None or lowest > most:
        return dimension
    return replace(dimension, step=step, most=None if most == left else most)


def is_cheap(problem: WidthProblem, rounded: Allocation, plain: Allocation) -> bool:
    """Whether an allocation of aligned widths is almost as good as one of any widths."""
    if rounded.status == "infeasible":
        return False

    def used(found: Allocation) -> float:
        pairs = zip(found.costs, problem.costs, strict=True)
        return max((cost / c.limit for cost, c in pairs if c.limit > 0), default=1.0)

    worth = rounded.value >= _VALUE * plain.value
    return worth and used(rounded) >= _USED * min(1.0, used(plain))


def is_near(problem: WidthProblem, rounded: Allocation, plain: Allocation) -> bool:
    """Whether no width is far from what a rule gave that doesn't weigh values against costs."""
    triples = zip(rounded.widths, plain.widths, problem.dimensions, strict=True)
    return all(
        abs(one - other) <= max(vector_step(len(d.gains)) / 2, _FAR * other)
        for one, other, d in triples
    )

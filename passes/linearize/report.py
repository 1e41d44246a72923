"""Section ``linearize`` of the report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SiteReport:
    """One call of a non-linearity.

    Attributes:
        node: Name of the call in the graph that came in.
        op: The family of operators.
        kept: Elements of one sample that are still compared.
        total: Elements of one sample that were.
        choice: ``keep``, ``identity``, ``affine``, ``poly2`` ...: what the others became.
        range_growth: The largest magnitude that reaches the site, relative to the source's, on the
            calibration inputs.
        reason: Why it had to stay as it is, or None.
    """

    node: str
    op: str
    kept: int
    total: int
    choice: str
    range_growth: float
    reason: str | None = None


@dataclass(frozen=True)
class LinearizeReport:
    """What became of the non-linearities. Elements are those of one sample.

    Attributes:
        relus_before: Elements that non-linearities evaluated (softmax apart).
        relus_after: Elements that they evaluate now.
        sites: Each call.
        select: The method that chose.
        granularity: What was kept or replaced as one.
        damage: Estimated increase of the loss, by the method's scores.
        bound: Proven: no choice has less by these scores.
        greedy_damage: What a greedy choice would have had.
        output_error: ``||y - y_source|| / ||y_source||`` over the calibration outputs.
        agreement: Share of calibration samples with the same largest output; None where the
            output isn't one row of numbers for each.
        protocol: With a limit on seconds of private inference: the protocol; else None, as what
            follows.
        seconds_before: Predicted communication of the source on the example inputs.
        seconds_after: The same of the result.
        rounds_before: Rounds of the source.
        rounds_after: Rounds of the result.
        bytes_before: Bytes of the source.
        bytes_after: Bytes of the result.
        advice: What would help if the network were designed anew, of ``select=deepreduce``.
        warnings: What a user should know, such as growing ranges.
    """

    relus_before: int
    relus_after: int
    sites: tuple[SiteReport, ...]
    select: str
    granularity: str
    damage: float
    bound: float
    greedy_damage: float
    output_error: float
    agreement: float | None
    warnings: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()
    protocol: str | None = None
    seconds_before: float | None = None
    seconds_after: float | None = None
    rounds_before: int | None = None
    rounds_after: int | None = None
    bytes_before: float | None = None
    bytes_after: float | None = None

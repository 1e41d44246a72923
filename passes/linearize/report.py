"""Section ``linearize`` of the report."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.passes.linearize.impact import Impact


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
class SoftmaxReport:
    """One call of a softmax.

    Attributes:
        node: Name of the call in the graph that came in; of an attention's, the attention.
        total: Probabilities of one sample.
        choice: ``keep``, ``relu`` or ``quad``.
        error: ``||p - p_source|| / ||p_source||`` over the probabilities at calibration, of all
            that is replaced up to here.
        reason: Why it stays as it is, or None.
    """

    node: str
    total: int
    choice: str
    error: float = 0.0
    reason: str | None = None


@dataclass(frozen=True)
class LinearizeReport:
    """What became of the non-linearities. Elements are those of one sample.

    Attributes:
        relus_before: Elements that non-linearities evaluated (softmax apart).
        relus_after: Elements that they evaluate now, those of ``softmax=relu`` included.
        sites: Each call.
        select: The method that chose.
        granularity: What was kept or replaced as one.
        damage: Estimated increase of the loss, by the method's scores.
        bound: Proven: no choice has less by these scores.
        gap: ``(damage - bound) / damage``.
        status: Of the solver's last answer: ``optimal`` or ``feasible``.
        greedy_damage: What a greedy choice would have had.
        output_error: ``||y - y_source|| / ||y_source||`` over the calibration outputs.
        agreement: Share of calibration samples with the same largest output; None where the
            output isn't one row of numbers for each.
        protocol: With a limit on seconds or levels of private inference: the protocol; else None,
            as what follows.
        seconds_before: Predicted communication of the source on the example inputs.
        seconds_after: The same of the result.
        rounds_before: Rounds of the source.
        rounds_after: Rounds of the result.
        bytes_before: Bytes of the source.
        bytes_after: Bytes of the result.
        levels_after: Multiplicative levels of the result, where these are limited.
        avoided: Replacements that were withdrawn since ranges behind them grew too far.
        advice: What would help if the network were designed anew, of ``select=deepreduce``.
        warnings: What a user should know, such as growing ranges.
        impact: Accuracy by class on the calibration data, of the source and of the result; by the
            source's own answers where there are no labels. None where outputs are no class scores,
            and without data.
        softmaxes: Each call of a softmax, where any shall be replaced.
    """

    relus_before: int
    relus_after: int
    sites: tuple[SiteReport, ...]
    select: str
    granularity: str
    damage: float
    bound: float
    gap: float
    status: str
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
    impact: Impact | None = None
    softmaxes: tuple[SoftmaxReport, ...] = ()
    levels_after: int | None = None
    avoided: tuple[str, ...] = ()

"""Which weights of one matrix, or of several, are kept: the best by a score."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import PipelineError
from graphopt.passes.prune.masks.matrices import Matrix

_TEXT = re.compile(r"(\d+):(\d+)")


@dataclass(frozen=True)
class Pattern:
    """At most ``n`` weights of each ``m`` that follow each other along the axis of the inputs.

    2:4 is what the sparse tensor cores of NVIDIA's GPUs take (Mishra et al., "Accelerating Sparse
    Deep Neural Networks", 2021).
    """

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern | None:
        """Read ``n:m``; None of an empty text.

        Raises:
            PipelineError: It is no pattern.
        """
        if not text:
            return None
        match = _TEXT.fullmatch(text.strip())
        n, m = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= n <= m:
            raise PipelineError(
                f"sparsify{{pattern={text}}}: not a pattern n:m with 1 <= n <= m",
                hint="pattern=2:4 keeps two of every four weights",
            )
        return cls(n, m)

    def misfit(self, matrix: Matrix) -> str | None:
        """Why a matrix can't have the pattern, or None."""
        if matrix.axis is None:
            return "the axis that is summed over is reshaped on the way"
        width = matrix.parameter.shape[matrix.axis]
        if width % self.m:
            return f"its {width} inputs are no multiple of {self.m}"
        return None

    def groups(self, matrix: Matrix) -> Tensor:
        """int64, of the parameter's shape: the number of each weight's group, from 0."""
        assert matrix.axis is not None
        shape = torch.Size(matrix.parameter.shape)
        moved = [*shape[: matrix.axis], *shape[matrix.axis + 1 :], shape[matrix.axis]]
        numbers = torch.arange(matrix.size // self.m).repeat_interleave(self.m)
        return numbers.reshape(moved).movedim(-1, matrix.axis)

    def best(self, scores: Tensor, axis: int) -> Tensor:
        """The ``n`` best of every group, of equal ones the first.

        Args:
            scores: Of the parameter's shape.
            axis: Along which groups lie.

        Returns:
            Bool, of the parameter's shape.
        """
        moved = scores.movedim(axis, -1)
        grouped = moved.reshape(-1, self.m)
        order = grouped.argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(grouped, dtype=torch.bool)
        kept.scatter_(1, order[:, : self.n], True)
        return kept.reshape(moved.shape).movedim(-1, axis).contiguous()

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def best(scores: Tensor, count: int) -> Tensor:
    """The ``count`` places of the largest scores, of equal ones the first; bool."""
    flat = scores.reshape(-1)
    kept = torch.zeros(flat.shape, dtype=torch.bool, device=flat.device)
    kept[flat.argsort(descending=True, stable=True)[:count]] = True
    return kept.reshape(scores.shape)


def above_threshold(
    scores: Mapping[str, Tensor], count: int, least: Mapping[str, int]
) -> dict[str, int]:
    """How many weights of each matrix lie above the one threshold that keeps ``count`` in all.

    Args:
        scores: Of each matrix.
        count: How many are kept.
        least: How many of each matrix are kept whatever their scores, no more than ``count`` in
            all.
    """
    names = list(scores)
    ranked = []
    for name in names:
        score = scores[name].reshape(-1).double().sort(descending=True).values
        score[: least[name]] = float("inf")
        ranked.append(score)
    owner = torch.repeat_interleave(
        torch.arange(len(names)), torch.tensor([len(score) for score in ranked])
    )
    order = torch.cat(ranked).argsort(descending=True, stable=True)[:count]
    counts = torch.bincount(owner[order], minlength=len(names)).tolist()
    return dict(zip(names, counts, strict=True))


def uniform(sizes: Sequence[int], count: int) -> list[int]:
    """The same share of each, as near as whole numbers come; ``count`` in all."""
    whole = sum(sizes)
    exact = [size * count / whole for size in sizes]
    counts = [int(share) for share in exact]
    rest = sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])
    for i in rest[: count - sum(counts)]:
        counts[i] += 1
    return counts

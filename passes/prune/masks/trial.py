"""A copy of the model for trying masks: how far outputs move, what the loss's gradients are."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.batches import Batch, calibration_batches
from graphopt.errors import GraphoptError, NonFiniteError
from graphopt.ir.program import Program
from graphopt.passes.prune.masks.matrices import Matrix
from graphopt.passes.prune.outputs import distance, floating_outputs, gradients_of, loss_of
from graphopt.pipeline import PassContext

_EXAMPLES = 256
"""Most examples of which gradients are taken."""

Kept = Mapping[str, Tensor]
"""Matrix -> bool tensor of what is kept; one that is missing is kept whole."""


class Trial:
    """A copy of a program's module in eval mode, with its batches.

    Attributes:
        batches: The data; without any the example inputs.
    """

    def __init__(self, program: Program, matrices: Sequence[Matrix], context: PassContext) -> None:
        """Copies the module and reads the data.

        Raises:
            UsageError: The data is empty.
        """
        self.module = copy.deepcopy(program.emit()).eval()
        self.seed = context.seed
        self.weights = {m.name: self.module.get_parameter(m.name) for m in matrices}
        self.batches = calibration_batches(context)
        self._exact: list[list[Tensor]] | None = None

    @torch.no_grad()
    def distortion(self, kept: Kept, rows: float = math.inf) -> float:
        """Mean over batches of the outputs' squared distance from the dense model's.

        Relative to their spread: 0 is the dense model, 1 as far as their mean is from them.

        Args:
            kept: The masks.
            rows: Of the batches the first ones that hold as many examples are used.

        Raises:
            NonFiniteError: An output is NaN or infinite.
        """
        if self._exact is None:
            self._exact = [self._outputs(batch) for batch in self.batches]
        held = itertools.accumulate((b.rows for b in self.batches), initial=0)
        some = [number for number, before in enumerate(held) if before < rows]
        some = some[: len(self.batches)]
        with self._masked(kept):
            found = sum(distance(self._exact[i], self._outputs(self.batches[i])) for i in some)
        if not math.isfinite(found):
            raise NonFiniteError(
                "the masked model's outputs are not finite on the calibration data",
                hint="are the data and the model's own outputs finite?",
            )
        return found / len(some)

    @torch.no_grad()
    def loss(self, kept: Kept) -> float:
        """The mean loss of the batches."""
        with self._masked(kept):
            values = [float(loss_of(self.module, batch, self.seed)) for batch in self.batches]
        return sum(values) / len(values)

    def gradients(self, kept: Kept) -> Iterator[dict[str, Tensor]]:
        """Gradients of the loss of single examples by the matrices, at the masked weights.

        Where the model or the loss takes whole batches only, those of batches.

        Raises:
            UnsupportedError: None of the matrices gets a gradient.
            NonFiniteError: A gradient is NaN or infinite.
        """
        with self._masked(kept):
            for batch in self.examples():
                yield self._gradient(batch)

    def examples(self) -> list[Batch]:
        """At most 256 single examples, from all batches in turn; batches if they can't be cut."""
        singles = [_singles(batch) for batch in self.batches]
        if any(len(each) > 1 for each in singles) and not self._takes(singles[0][0]):
            singles = [[batch] for batch in self.batches]
        in_turn = itertools.chain.from_iterable(itertools.zip_longest(*singles))
        return list(itertools.islice((each for each in in_turn if each is not None), _EXAMPLES))

    def _takes(self, example: Batch) -> bool:
        try:
            self._gradient(example)
        except (GraphoptError, RuntimeError, ValueError, TypeError, IndexError):
            return False
        return True

    def _gradient(self, batch: Batch) -> dict[str, Tensor]:
        wanted = [w.requires_grad_() for w in self.weights.values()]
        with torch.enable_grad():
            found = gradients_of(loss_of(self.module, batch, self.seed), wanted)
        pairs = zip(self.weights.items(), found, strict=True)
        result = {n: torch.zeros_like(w) if g is None else g for (n, w), g in pairs}
        for name, gradient in result.items():
            if not bool(gradient.isfinite().all()):
                raise NonFiniteError(
                    f"the gradient of {name} holds NaN or infinities on the calibration data",
                    hint="are the data, the loss and its gradients finite?",
                )
        return result

    @contextmanager
    def _masked(self, kept: Kept) -> Iterator[None]:
        """Zeros where a mask keeps nothing, for a while."""
        saved = {name: self.weights[name].detach().clone() for name in kept}
        try:
            with torch.no_grad():
                for name, mask in kept.items():
                    self.weights[name].masked_fill_(~mask.to(self.weights[name].device), 0)
            yield
        finally:
            with torch.no_grad():
                for name, values in saved.items():
                    self.weights[name].copy_(values)

    def _outputs(self, batch: Batch) -> list[Tensor]:
        return floating_outputs(self.module, batch, self.seed)


def _singles(batch: Batch) -> list[Batch]:
    """The examples of a batch, if all its tensors have as many rows."""
    leaves, tree = pytree.tree_flatten((batch.args, batch.kwargs, batch.targets))
    sizes = {t.shape[0] if t.dim() else 0 for t in leaves if isinstance(t, Tensor)}
    if len(sizes) != 1 or sizes == {0}:
        return [batch]

    def single(row: int) -> Batch:
        cut = [t[row : row + 1] if isinstance(t, Tensor) else t for t in leaves]
        args, kwargs, targets = pytree.tree_unflatten(cut, tree)
        return Batch(args, kwargs, batch.criterion, targets)

    return [single(row) for row in range(sizes.pop())]

"""What making an explanation takes: `python -m tests.benchmarks.explanation_build [OPTION ...]`.

Processor seconds of the stages of `graphopt.explain`, of one thread, the median over calls after a
first one that fills caches: `capture` (and its traces with and without free sizes), `plan` (rules,
layouts), `trace` (the run of forward and relevance as one graph, `simplify` apart), `whole`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import graphopt
from graphopt.ir import capture
from graphopt.passes.relevance import module, tracing
from tests.zoo import ZOO

MODELS = ("bert", "gpt2", "llama", "t5", "resnet", "swin", "efficientnet_lite0")
STAGES = ("capture", "plan", "trace", "simplify", "whole")


class Stages:
    """Processor seconds of one call of `graphopt.explain`.

    Attributes:
        seconds: Stage -> seconds, those of inner stages included.
        traces: How many traces were made of the model: with free sizes, without.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.traces = [0, 0]

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time is noted."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += time.process_time() - start

        return wrapped

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(model: Any, signature: Any, flat: Any, dynamic: Any, **kwargs: Any) -> Any:
            self.traces[dynamic is None] += 1
            return function(model, signature, flat, dynamic, **kwargs)

        return wrapped

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Note what happens inside."""
        places = (
            (capture, "capture", "capture"),
            (module, "explainer_of", "plan"),
            (module, "trace", "trace"),
            (tracing, "simplify", "simplify"),
        )
        with contextlib.ExitStack() as stack:
            for owner, name, stage in places:
                timed = self.timed(stage, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            stack.enter_context(mock.patch.object(capture, "trace", self._counted(capture.trace)))
            yield


def _largest(output: Any) -> Tensor:
    """The largest score of each sample."""
    return output["logits"].flatten(1).amax(-1)


def built(name: str) -> Stages:
    """The stages of an explanation of a model of the zoo."""
    model = ZOO[name].model().eval()
    args, kwargs = ZOO[name].inputs()
    with torch.no_grad():
        target = "argmax" if isinstance(model(*args, **kwargs), Tensor) else _largest
    stages = Stages()
    with stages.watched():
        explain = stages.timed("whole", graphopt.explain)
        explain(model, args, example_kwargs=kwargs, target=target)
    return stages


def rows(names: Sequence[str], repeats: int) -> Iterator[tuple[str, ...]]:
    """A row for each model."""
    yield ("model", "traces with free sizes", "without", *STAGES)
    for name in names:
        found = [built(name) for _ in range(repeats + 1)][1:]
        seconds = [statistics.median(s.seconds[stage] for s in found) for stage in STAGES]
        yield (name, *map(str, found[0].traces), *(f"{s:.2f}" for s in seconds))


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="names of the zoo, with commas")
    parser.add_argument("--repeats", type=int, default=3, help="calls after the first one")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for row in rows(options.models.split(","), options.repeats):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""What an explanation costs: `python -m tests.benchmarks.relevance [SECTION ...] [--models NAMES]`.

Sections: `cost` (seconds of the quotient emitter against the source model's forward and input-only
backward), `rules` (seconds of the composites with epsilon, gamma and alpha-beta against forward
and full backward), `peers` (seconds and peak bytes against LXT's, each relative to its own plain
forward and input-only backward), `memory` (peaks under budgets).

One thread.  A figure is the median over pairs of runs in turns, of processor seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.cost.allocator import trace_memory
from graphopt.errors import BudgetInfeasible
from tests.benchmarks.relevance_models import SUBJECTS, Inputs, Subject
from tests.peers import client

Row = tuple[str, ...]

QUOTIENT_BAR, EPSILON_BAR, SIGNS_BAR, MEMORY_BAR = 1.2, 2.0, 4.0, 1.1
_SIGNS = ("epsilon-gamma-box", "epsilon-alpha2-beta1")


class Plain:
    """Forward and backward of a model, by hand.

    Args:
        model: The model.
        inputs: Its keyword inputs.
        output: Which output is explained, or None where there is one.
        weights: Whether parameters get gradients too.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, output: str | None, *, weights: bool = False
    ) -> None:
        self.model = model.requires_grad_(weights)
        self.inputs, self.output = dict(inputs), output
        self.weights = list(model.parameters()) if weights else []
        self.name = next((n for n, t in inputs.items() if t.is_floating_point()), None)
        self.leaf: Tensor | None = None

    def __call__(self) -> Any:
        """The gradients of the largest scores."""
        with torch.enable_grad():
            scores = self._scores()
            chosen = scores.flatten(1) if scores.ndim < 3 else scores[:, -1]
            value = chosen.amax(-1).sum()
            return torch.autograd.grad(value, [self.leaf, *self.weights], allow_unused=True)  # type: ignore[list-item]

    def _scores(self) -> Tensor:
        inputs = dict(self.inputs)
        if self.name is not None:
            self.leaf = inputs[self.name] = inputs[self.name].detach().requires_grad_()
            return self._run(inputs)
        embedding: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        with torch.no_grad():
            self.leaf = embedding(inputs.pop("input_ids")).requires_grad_()
        return self._run({**inputs, "inputs_embeds": self.leaf})

    def _run(self, inputs: Inputs) -> Tensor:
        found = self.model(**inputs)
        return found if self.output is None else found[self.output]


def ratio(own: Callable[[], Any], other: Callable[[], Any], repeats: int, warmup: int = 3) -> float:
    """Median of the ratios of processor seconds, over pairs of runs in turns."""
    found = []
    for turn in range(warmup + repeats):
        first, second = (_seconds(call) for call in (own, other))
        if turn >= warmup:
            found.append(first / second)
    return statistics.median(found)


def _seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def target_of(subject: Subject) -> Any:
    """The largest score of the output that is explained; of a sequence that of its last place."""
    name = subject.output
    if name in (None, "logits"):
        return "argmax"
    return functools.partial(_largest, name=name)


def _largest(output: Any, name: str) -> Tensor:
    return output[name].amax(-1)


def explained(subject: Subject, **options: Any) -> tuple[Callable[[], Any], nn.Module, Inputs]:
    """A call that explains, the module, and the inputs."""
    model, inputs = subject.build()
    module = graphopt.explain(
        model, (), example_kwargs=inputs, target=target_of(subject), **options
    )
    return functools.partial(module, **inputs), module, inputs


def cost(names: Sequence[str], repeats: int) -> Iterator[Row]:
    """Rows of the section `cost`."""
    yield ("model", "composite", "seconds / (forward + input backward)", "bar")
    for name in names:
        subject = SUBJECTS[name]
        model, inputs = subject.build()
        plain = Plain(model, inputs, subject.output)
        for composite in ("cp-lrp", "attnlrp"):
            call, _, _ = explained(subject, composite=composite)
            yield (name, composite, f"{ratio(call, plain, repeats):.2f}", f"{QUOTIENT_BAR}")


def rules(names: Sequence[str], repeats: int) -> Iterator[Row]:
    """Rows of the section `rules`."""
    yield ("model", "composite", "emitter", "seconds / (forward + backward)", "bar")
    for name in names:
        if name not in ("vgg", "resnet", "efficientnet"):
            continue
        subject = SUBJECTS[name]
        model, inputs = subject.build()
        plain = Plain(model, inputs, subject.output, weights=True)
        for composite, emitter, bar in (
            ("epsilon", "auto", EPSILON_BAR),
            ("epsilon", "explicit", EPSILON_BAR),
            *((c, "auto", SIGNS_BAR) for c in _SIGNS),
        ):
            call, _, _ = explained(subject, composite=composite, emitter=emitter)
            yield (name, composite, emitter, f"{ratio(call, plain, repeats):.2f}", f"{bar}")


def peers(names: Sequence[str], repeats: int) -> Iterator[Row]:
    """Rows of the section `peers`."""
    yield ("model", "rules", "ours", "LXT", "our peak", "LXT's peak", "ratio", "plain peak")
    if client.missing():
        yield (str(client.missing()),)
        return
    for name in names:
        subject = SUBJECTS[name]
        for kind in subject.lxt:
            yield _beside_lxt(name, subject, kind, repeats)


def _beside_lxt(name: str, subject: Subject, kind: str, repeats: int) -> Row:
    model, inputs = subject.build()
    plain = Plain(model, inputs, subject.output)
    with torch.no_grad():
        output = model(**inputs)[subject.output]
    last = output[:, -1] if output.ndim == 3 else output
    index = last.argmax(-1, keepdim=True)
    if output.ndim == 3:
        index = torch.cat([torch.full_like(index, output.shape[1] - 1), index], 1)
    composite = "cp-lrp-activated" if kind == "cp" else "attnlrp"  # the same rules as LXT's
    call, _, _ = explained(subject, composite=composite)
    other = dataclasses.replace(client.Lxt.of(model, kind), output=str(subject.output))
    figures, _ = other.cost(inputs, index, repeats=repeats, warmup=3)
    ours = ratio(call, plain, repeats)
    peak = trace_memory(call).peak
    return (
        name, kind, f"{ours:.2f}", f"{figures['ratio']:.2f}", f"{peak:,}",
        f"{int(figures['peak']):,}", f"{peak / figures['peak']:.2f}",
        f"{trace_memory(plain).peak:,}",
    )  # fmt: skip


def memory(names: Sequence[str], repeats: int) -> Iterator[Row]:
    """Rows of the section `memory`."""
    yield ("model", "budget", "without", "predicted", "measured", "recomputed", "bit-equal")
    for name in names:
        subject = SUBJECTS[name]
        free, _, _ = explained(subject)
        reference = trace_memory(free).peak
        wanted = free()
        for share in ("80%", "60%"):
            try:
                call, module, _ = explained(subject, memory_budget=share)
            except BudgetInfeasible as error:
                yield (name, share, f"{reference:,}", f"infeasible: {error.smallest:,}")
                continue
            got = call()
            same = all(torch.equal(got.relevance[k], r) for k, r in wanted.relevance.items())
            memory, plan = _figures(module)
            yield (
                name, share, f"{reference:,}", f"{memory.predicted_peak:,}",
                f"{trace_memory(call).peak:,}", f"{plan.overhead:.1%} (gap {plan.gap:.1%})",
                str(same),
            )  # fmt: skip


def _figures(module: Any) -> tuple[Any, Any]:
    return module.memory, module.schedule


SECTIONS = {"cost": cost, "rules": rules, "peers": peers, "memory": memory}


def main() -> None:
    """Print the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=[])
    parser.add_argument("--models", default=",".join(SUBJECTS))
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for section in options.sections or SECTIONS:
        print(f"\n{section}", flush=True)
        for row in SECTIONS[section](options.models.split(","), options.repeats):
            print("  " + " | ".join(row), flush=True)


if __name__ == "__main__":
    main()

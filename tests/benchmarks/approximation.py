"""Approximate backward: what a granted gradient error saves, and steps against published ones.

    python -m tests.benchmarks.approximation [--models vit384+qv ...] [--granted 6.3%]

First, `share{gradient_error=...}` on the models of `tests.benchmarks.models`: bytes saved for
backward, measured gradient error and cosine. Second, at every activation of every model: the error
of all gradients together if this activation alone multiplies by a step function of two bits in
place of its derivative, with the published constants (ReGELU2, ReSiLU2) and with those that are
fitted to the site. The second part runs the source models, eagerly: graphopt only fits.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.passes.share.fit import REGELU2, RESILU2, Steps, fit_steps
from tests.benchmarks.models import TRANSFORMERS

# What has to be saved at a gradient error of 6.3 %, as a share of eager's bytes.
BARS = {"vit384+qv": 0.36, "bert384+qv": 0.35}


@dataclass(frozen=True)
class SiteError:
    """Errors of all gradients if one activation's derivative is a step function."""

    model: str
    site: str
    published: float
    fitted: float


class _Stepped(torch.autograd.Function):
    """An activation whose derivative is a step function."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, act: nn.Module, steps: Steps) -> Tensor:
        ctx.slope = torch.from_numpy(steps(x.detach().double().numpy())).to(x.dtype)
        with torch.no_grad():
            return act(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return grads[0] * ctx.slope, None, None


class _Replaced(nn.Module):
    def __init__(self, act: nn.Module, steps: Steps) -> None:
        super().__init__()
        self.act, self.steps = act, steps

    def forward(self, x: Tensor) -> Tensor:
        """The activation."""
        return _Stepped.apply(x, self.act, self.steps)  # type: ignore[return-value]


def activations(model: nn.Module) -> Iterator[tuple[str, nn.Module, Steps]]:
    """Path, module and published steps of every activation."""
    for path, part in model.named_modules():
        kind = type(part).__name__.lower()
        if "gelu" in kind:
            yield path, part, REGELU2
        elif "silu" in kind:
            yield path, part, RESILU2


def gradient(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """All gradients of a seeded step."""
    model.zero_grad()
    torch.manual_seed(0)
    model(**inputs).loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def replaced(model: nn.Module, path: str, steps: Steps, inputs: dict[str, Any]) -> Tensor:
    """The gradients with one activation replaced; it is put back."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    act = getattr(owner, name)
    setattr(owner, name, _Replaced(act, steps))
    try:
        return gradient(model, inputs)
    finally:
        setattr(owner, name, act)


def site_errors(name: str) -> list[SiteError]:
    """Both errors at every activation of a model."""
    model, _, inputs = TRANSFORMERS[name]()
    exact = gradient(model, inputs)

    def error(path: str, steps: Steps) -> float:
        return float((replaced(model, path, steps, inputs) - exact).norm() / exact.norm())

    return [
        SiteError(name, path, error(path, published), error(path, fitted(model, act, inputs)))
        for path, act, published in list(activations(model))
    ]


def fitted(model: nn.Module, act: nn.Module, inputs: dict[str, Any]) -> Steps:
    """The steps for what goes into an activation."""
    seen: list[Tensor] = []
    hook = act.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    try:
        gradient(model, inputs)
    finally:
        hook.remove()
    u = seen[0].flatten().double().requires_grad_()
    (slope,) = torch.autograd.grad(act(u).sum(), u)
    return fit_steps(u.detach().numpy(), slope.numpy().astype(np.float64))


def granted(name: str, error: str) -> dict[str, Any]:
    """The report of `share` with a granted error."""
    model, _, inputs = TRANSFORMERS[name]()
    passes = f"canonicalize,share{{gradient_error={error}}}"
    module = graphopt.optimize(model, passes=passes, example_kwargs=inputs)
    return module.report.to_dict()["share"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs both parts; 1 if a bar is missed or a published site is better."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(TRANSFORMERS), choices=TRANSFORMERS)
    parser.add_argument("--granted", default="6.3%", help="the gradient error")
    options = parser.parse_args(arguments)
    console, missed = Console(width=130), False
    table = Table("model", "eager", "saved", "less", "bar", "gradient error", "cosine", "values",
                  title=f"share{{gradient_error={options.granted}}}")  # fmt: skip
    for name in options.models:
        print(f"{name} ...", file=sys.stderr)
        found = granted(name, options.granted)
        less, bar = 1 - found["saved_after"] / found["saved_before"], BARS.get(name)
        missed |= bar is not None and less < bar
        rules = Counter(site["rule"] for site in found["sites"])
        few = ", ".join(f"{rules[r]} {r}" for r in ("8 bits", "4 bits", "2-bit derivative"))
        table.add_row(
            name, f"{found['saved_before']:,}", f"{found['saved_after']:,}", f"{less:.1%}",
            "" if bar is None else f"{bar:.1%}", f"{found['gradient_error']:.2%}",
            f"{found['gradient_cosine']:.5f}", few,
        )  # fmt: skip
    console.print(table)
    table = Table("model", "activation", "published", "fitted", title="gradient error of one site")
    for name in options.models:
        print(f"{name}: site by site ...", file=sys.stderr)
        for site in site_errors(name):
            missed |= site.fitted >= site.published
            table.add_row(name, site.site, f"{site.published:.3%}", f"{site.fitted:.3%}")
    console.print(table)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())

"""Models of the zoo with a quarter of their non-linearities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.private import comparisons
from tests.passes.linearize.nets import section
from tests.passes.linearize.oracle import blended
from tests.zoo import ZOO, floating_leaves

QUICK = ["depthwise", "conv_transpose"]
LONG = ["cnn", "resnet", "unet", "bert", "vit", "llama", "t5"]
SMOOTH = {"gelu", "silu", "sigmoid", "tanh", "mish", "softplus", "log_sigmoid"}


def outputs(module: Any, args: Any, kwargs: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        return floating_leaves(module(*args, **kwargs))


@pytest.mark.parametrize(
    "name", [*QUICK, *[pytest.param(name, marks=pytest.mark.slow) for name in LONG]]
)
def test_a_quarter(name: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    model: nn.Module = entry.model().eval()
    args, kwargs = entry.inputs(8)
    module = graphopt.optimize(
        model, None, args, example_kwargs=kwargs, data=[kwargs or args],
        passes="canonicalize,linearize{relus=25%,rounds=2}", time_limit=20.0,
    )  # fmt: skip
    told = section(module)
    budget = told["relus_before"] // 4
    assert told["relus_after"] <= budget
    assert any(0 < site["kept"] < site["total"] for site in told["sites"])
    # what the model compares besides, such as masks of ids, stays as it is
    saved = sum(s["total"] - s["kept"] for s in told["sites"] if s["op"] not in SMOOTH)
    before, after = (sum(comparisons(m, *args, **kwargs).values()) for m in (model, module))
    assert before - after == saved
    second, other = entry.inputs(3)
    for given in ((args, kwargs), (second, other)):
        want, got = outputs(model, *given), outputs(module, *given)
        assert [t.shape for t in want] == [t.shape for t in got]
        assert all(bool(t.isfinite().all()) for t in got)
    if name in QUICK:
        assert after == told["relus_after"] == budget
        assert torch.allclose(blended(model, module, *args), module(*args), atol=1e-4)

"""What holds on the CPU holds on a CUDA device; skipped where there is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import graphopt
from tests.zoo import ZOO
from tests.zoo.registry import floating_leaves, probe_loss

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def _full_precision() -> Any:
    """Without TF32, so that results can be compared."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def on_cuda(name: str, training: bool = True) -> tuple[nn.Module, tuple[Any, ...], dict[str, Any]]:
    entry = ZOO[name]
    args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), entry.inputs())
    return entry.model().train(training).cuda(), args, kwargs


def step(model: nn.Module, args: Any, kwargs: Any) -> tuple[list[torch.Tensor], dict[str, Any]]:
    torch.manual_seed(7)
    model.zero_grad()
    outputs = model(*args, **kwargs)
    probe_loss(outputs).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return floating_leaves(outputs), gradients


def close(got: Any, expected: Any, tolerance: float = 1e-4) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * max(scale, 1e-6))


def same_gradients(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """All together: one element on the other side of a kink moves a small gradient by 1e-3."""
    assert got.keys() == expected.keys()
    difference = torch.stack([(got[k] - expected[k]).norm() for k in expected]).norm()
    assert difference <= 1e-3 * torch.stack([t.norm() for t in expected.values()]).norm()


MASKED = pytest.mark.xfail(
    reason="traced, transformers makes a mask that it leaves out otherwise; an attention with a "
    "mask of 17 keys runs another kernel, whose dropout draws other numbers"
)


@pytest.mark.parametrize(
    ("name", "budget"),
    [
        ("cnn", "memory=60%"),
        ("resnet", "memory=60%"),
        ("unet", "memory=70%"),
        ("gpt2", "memory=60%"),
        ("bert", "memory=90%"),  # small tensors: the allocator rounds them up to 512 bytes each
        ("llama", "memory=90%"),
        pytest.param("vit", "memory=90%", marks=MASKED),
    ],
)
def test_a_memory_budget_is_kept(name: str, budget: str) -> None:
    model, args, kwargs = on_cuda(name)
    optimized = graphopt.optimize(
        model, budget, args, example_kwargs=kwargs, loss=probe_loss, time_limit=10
    )
    memory = optimized.report.to_dict()["memory"]
    assert memory["measured_peak"] <= memory["budget"]
    expected, wanted = step(copy.deepcopy(model), args, kwargs)
    outputs, gradients = step(optimized, args, kwargs)
    for got, value in zip(outputs, expected, strict=True):
        close(got, value)
    same_gradients(gradients, wanted)


def test_what_was_planned_on_the_cpu_moves() -> None:
    entry = ZOO["cnn"]
    args, kwargs = entry.inputs()
    optimized = graphopt.optimize(entry.model(), "memory=60%", args, time_limit=10).cuda()
    model, args, kwargs = on_cuda("cnn")
    expected, wanted = step(model, args, kwargs)
    outputs, gradients = step(optimized, args, kwargs)
    close(outputs[0], expected[0])
    same_gradients(gradients, wanted)


@pytest.mark.parametrize("budget", ["flops=60%", "params=60%", "relus=50%"])
def test_other_budgets_are_kept(budget: str) -> None:
    model, args, kwargs = on_cuda("resnet", training=False)
    optimized = graphopt.optimize(
        model, budget, args, example_kwargs=kwargs, data=[args[0]] * 2, time_limit=20
    )
    assert floating_leaves(optimized(*args, **kwargs))[0].is_cuda
    assert all(p.is_cuda for p in optimized.parameters())


@pytest.mark.parametrize("name", ["cnn", "resnet", "bert", "gpt2", "llama", "vit"])
@pytest.mark.parametrize("composite", ["cp-lrp", "attnlrp", "epsilon-plus"])
def test_an_explanation_is_that_of_the_cpu(name: str, composite: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    explain = graphopt.explain
    here = explain(entry.model().eval(), args, example_kwargs=kwargs, composite=composite)
    expected = here(*args, **kwargs)
    model, args, kwargs = on_cuda(name, training=False)
    there = explain(model, args, example_kwargs=kwargs, composite=composite)
    got = there(*args, **kwargs)
    for key, value in expected.relevance.items():
        close(got.relevance[key].cpu(), value)
    ledger = dict(got.ledger)
    output = ledger.pop("output")
    torch.testing.assert_close(sum(ledger.values()), output, rtol=1e-4, atol=1e-5)


def test_it_saves_and_loads(tmp_path: Any) -> None:
    model, args, _ = on_cuda("cnn")
    optimized = graphopt.optimize(model, "memory=70%", args, time_limit=10)
    optimized.save(tmp_path / "model.graphopt")
    loaded = graphopt.load(tmp_path / "model.graphopt").cuda()
    torch.testing.assert_close(loaded.eval()(*args), optimized.eval()(*args))

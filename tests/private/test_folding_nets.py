"""The folded view of whole networks: drawn chains, linearized ones, models of the zoo."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import UsageError
from graphopt.private import comparisons, lower, predict, private_cost
from tests.benchmarks.warped import WarpedNet
from tests.passes.linearize.nets import Net, drawn, linearized, settled
from tests.private.test_folding import Scaled, Squared, captured, error
from tests.zoo import ZOO, floating_leaves


def secret_ops(module: Any, *args: Tensor) -> dict[str, int]:
    """How often parties multiply."""
    found = Counter(step.op for step in lower(module, args).steps)
    return {op: found[op] for op in ("multiply", "square", "conv", "matmul", "relu")}


# drawn chains -------------------------------------------------------------------------------------

CHANNELS = 4
KINDS = (
    "conv", "padded", "pointwise", "bare", "grouped", "strided", "transposed", "norm", "scaled",
    "square", "relu", "residual", "twice", "pool", "factor", "cat",
)  # fmt: skip


class Layer(nn.Module):
    """One link of a chain."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        c = CHANNELS
        layers: dict[str, Any] = {
            "conv": lambda: nn.Conv2d(c, c, 2),
            "padded": lambda: nn.Conv2d(c, c, 3, padding=1),
            "pointwise": lambda: nn.Conv2d(c, c, 1),
            "bare": lambda: nn.Conv2d(c, c, 1, bias=False),
            "grouped": lambda: nn.Conv2d(c, c, 3, padding=1, groups=2),
            "strided": lambda: nn.Conv2d(c, c, 3, 2, padding=1),
            "transposed": lambda: nn.ConvTranspose2d(c, c, 2, 2),
            "norm": lambda: nn.BatchNorm2d(c),
            "scaled": lambda: Scaled(c),
            "square": lambda: Squared(*(torch.randn(3, c) * 0.3).tolist()),
            "residual": lambda: nn.Conv2d(c, c, 3, padding=1),
            "twice": lambda: nn.BatchNorm2d(c),
            "cat": lambda: nn.Conv2d(2 * c, c, 1),
        }
        self.inner = layers[kind]() if kind in layers else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        if kind == "relu":
            return x.relu()
        if kind == "residual":
            return x - self.inner(x)
        if kind == "twice":
            return self.inner(x) + 0.5 * x.relu()
        if kind == "pool":
            return nn.functional.avg_pool2d(x, 3, 1, padding=1)
        if kind == "factor":
            return 0.7 * (1.0 - x / 2)
        if kind == "cat":
            return self.inner(torch.cat([x, x.relu()], 1))
        return self.inner(x)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from(KINDS), min_size=2, max_size=7), st.integers(0, 1000))
def test_chains_compute_the_same(kinds: list[str], seed: int) -> None:
    torch.manual_seed(seed)
    model = settled(nn.Sequential(*[Layer(kind) for kind in kinds]))
    module = captured(model, drawn(2, CHANNELS, 9, 9)).eval()
    view = module.folded()
    assert error(module, view, drawn(3, CHANNELS, 9, 9, seed=seed).double()) < 1e-9
    x = drawn(1, CHANNELS, 9, 9).double()
    before, after = secret_ops(module, x), secret_ops(view, x)
    assert all(after[op] <= before[op] for op in before), (before, after)


# linearized networks ------------------------------------------------------------------------------


@cache
def resnet(spec: str) -> tuple[Any, Tensor]:
    """The network of nine sites, untrained, whose norms have seen some images; an image."""
    torch.manual_seed(0)
    model = WarpedNet()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.weight.data.uniform_(0.5, 1.5)
            norm.bias.data.normal_(0, 0.3)
    images = drawn(64, 1, 14, 14)
    with torch.no_grad():
        for _ in range(30):
            model.train()(images)
    return linearized(model.eval(), images, spec=spec).eval(), images[:1]


LEFT = {
    "relus=0,replacement=affine": {"multiply": 0, "square": 0, "conv": 11, "matmul": 1, "relu": 0},
    "relus=0,replacement=poly2": {"multiply": 2, "square": 9, "conv": 11, "matmul": 1, "relu": 0},
    "relus=50%,replacement=poly2": {
        "multiply": 10,
        "square": 9,
        "conv": 11,
        "matmul": 1,
        "relu": 9,
    },
}


@pytest.mark.parametrize(
    "spec",
    [pytest.param(each, marks=() if "50%" in each else pytest.mark.slow) for each in LEFT],
)
def test_a_linearized_resnet(spec: str) -> None:
    module, x = resnet(spec)
    view = module.folded()
    assert error(module, view, drawn(5, 1, 14, 14, seed=4)) < 1e-5
    assert secret_ops(view, x) == LEFT[spec]
    assert secret_ops(module, x)["multiply"] >= 20, "norms and coefficients"
    assert sum(comparisons(view, x).values()) == sum(comparisons(module, x).values())


OTHERS = ["cheetah", "semi2k", "aby3", "gc"]


@pytest.mark.parametrize("spec", LEFT)
@pytest.mark.parametrize(
    "protocol", ["crypten", *[pytest.param(p, marks=pytest.mark.slow) for p in OTHERS]]
)
def test_folding_never_costs_more(spec: str, protocol: str) -> None:
    module, x = resnet(spec)
    for public in ((), ("_graphopt.*",), ("*.bias",), ("*conv*",)):
        view = module.folded(protocol=protocol, public=public)
        before, after = (predict(m, protocol, "wan", (x,), public=public) for m in (module, view))
        assert after.rounds <= before.rounds
        assert after.bytes <= before.bytes
        assert public == ("*conv*",) or after.rounds < before.rounds


def test_a_prediction_of_the_view() -> None:
    module, x = resnet("relus=0,replacement=affine")
    told = predict(module, "crypten", "wan", (x,), folded=True)
    assert told == predict(module.folded(protocol="crypten"), "crypten", "wan", (x,))
    report = private_cost(module, (x,), engine="none", network_name="wan", folded=True)
    assert report.predicted == told
    assert told.rounds == 13, "twelve linear operators, and the opening"
    model = settled(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)))
    assert predict(model, example=(drawn(1, 4),), folded=True).rounds == 2
    with pytest.raises(UsageError, match="graph module"):
        predict(module.program.module, example=(x,), folded=True)


# the zoo ------------------------------------------------------------------------------------------

QUICK = {
    "resnet": {"batch_norm": 0}, "unet": {"batch_norm": 0}, "depthwise": {"batch_norm": 0},
    "conv_transpose": {"batch_norm": 0}, "conv1d_3d": {}, "shared_batchnorm": {"batch_norm": 0},
    "tied_weights": {}, "inplace_chain": {}, "weight_norm": {}, "dtype_mix": {},
}  # fmt: skip
SLOW = [
    "llama",
    "vit",
    "t5",
    "bert",
    "swin",
    "whisper",
    "mamba",
    "efficientnet_lite0",
    "transformer",
]


@pytest.mark.parametrize("name", [*QUICK, *[pytest.param(n, marks=pytest.mark.slow) for n in SLOW]])
def test_the_zoo(name: str) -> None:
    entry = ZOO[name]
    torch.manual_seed(0)
    args, kwargs = entry.inputs(4)
    module = graphopt.capture(entry.model().eval(), args, kwargs).emit().eval()
    view = module.folded()
    args, kwargs = entry.inputs(3)
    with torch.no_grad():
        want = floating_leaves(module(*args, **kwargs))
        got = floating_leaves(view(*args, **kwargs))
    for one, other in zip(want, got, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * float(one.abs().max()))
    found = Counter(str(n.target).split(".")[1] for n in view.program.module.graph.nodes
                    if str(n.target).startswith("aten."))  # fmt: skip
    assert all(found[op] == count for op, count in QUICK.get(name, {}).items())


def test_a_view_in_half_precision() -> None:
    model = settled(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()))
    module = graphopt.capture(model.bfloat16(), (drawn(2, 3, 8, 8).bfloat16(),)).emit().eval()
    view = module.folded()
    assert {t.dtype for t in view.state_dict().values()} == {torch.bfloat16}
    assert error(module.float(), view.float(), drawn(2, 3, 8, 8)) < 2e-2


def test_a_model_without_anything_to_fold() -> None:
    module = captured(Net(lambda s, x: x.relu()), drawn(2, 3))
    assert torch.equal(module.folded()(drawn(5, 3).double()), module(drawn(5, 3).double()))

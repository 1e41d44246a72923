"""The emitted module: what it computes, and what it still compares."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

import graphopt
from graphopt.private import comparisons
from graphopt.private.comparisons import COMPARING
from tests.passes.linearize.nets import Net, cnn, drawn, linearized, mlp, section, settled
from tests.passes.linearize.oracle import blended

images, vectors, sequences = drawn(12, 3, 8, 8), drawn(40, 6), drawn(12, 5, 6)


@dataclass(frozen=True)
class Case:
    """A model, what it takes, and where its fixed places and channels are."""

    model: Callable[[], nn.Module]
    x: Tensor
    block: tuple[int, int | None] = (1, None)
    channel: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def signals() -> nn.Module:
    return settled(
        nn.Sequential(
            nn.Conv1d(5, 4, 3, padding=1), nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2),
            nn.Conv1d(4, 4, 3), nn.PReLU(4), nn.Flatten(), nn.LazyLinear(3),
        )
    )  # fmt: skip


def volumes() -> nn.Module:
    return settled(
        nn.Sequential(
            nn.Conv3d(1, 3, 3, padding=1), nn.BatchNorm3d(3), nn.ReLU(),
            nn.MaxPool3d(2, padding=1), nn.Conv3d(3, 3, 2), nn.ReLU6(), nn.Flatten(),
            nn.LazyLinear(3),
        )
    )  # fmt: skip


def tokens(*acts: nn.Module) -> nn.Module:
    first, second = acts or (nn.ReLU(), nn.ReLU())
    return nn.Sequential(
        nn.Linear(6, 8), first, nn.LayerNorm(8), nn.Linear(8, 8), second, nn.Linear(8, 3)
    ).eval()


def of_any_length() -> nn.Module:
    """Channels first, and a length that is free."""
    first, second = nn.Conv1d(6, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)
    function = lambda s, x: s.o(s.p(s.b(F.relu(s.a(x.transpose(1, 2)))))).mean(2)  # noqa: E731
    return Net(function, a=first, b=second, p=nn.PReLU(4), o=nn.Conv1d(4, 2, 1)).eval()


def pooled() -> nn.Module:
    return cnn(nn.ReLU(), nn.ReLU(inplace=True), pool=nn.MaxPool2d(3, 2, padding=1))


LAST: dict[str, Any] = {"block": (1, None), "channel": -1}
FREE: dict[str, Any] = {"options": {"dynamic": "batch,sequence"}}
CASES: dict[str, Case] = {
    "vectors": Case(mlp, vectors),
    "images": Case(cnn, images),
    "pooled": Case(pooled, images),
    "signals": Case(signals, drawn(12, 5, 10)),
    "volumes": Case(volumes, drawn(8, 1, 4, 4, 4)),
    "tokens": Case(tokens, sequences, **LAST),
    "any length": Case(tokens, sequences, block=(2, None), channel=-1, **FREE),
    "any length, channels first": Case(of_any_length, sequences, block=(1, 2), **FREE),
    "one slope": Case(lambda: cnn(nn.PReLU(), nn.PReLU()), images),
    "slopes": Case(lambda: cnn(nn.PReLU(6, 0.1), nn.PReLU(6, 0.4)), images),
    "relu6 and clamp": Case(lambda: cnn(nn.ReLU6(), Net(lambda s, x: x.clamp(-0.5, 1.5))), images),
    "hardtanh": Case(lambda: mlp(nn.Hardtanh(-0.5, 0.7), nn.Hardtanh()), vectors),
    "leaky and abs": Case(lambda: cnn(nn.LeakyReLU(0.2), Net(lambda s, x: x.abs())), images),
    "smooth": Case(lambda: mlp(nn.GELU(), nn.SiLU(), nn.Sigmoid(), nn.Tanh()), vectors),
    "smooth tokens": Case(lambda: tokens(nn.GELU("tanh"), nn.SiLU()), sequences, **LAST),
    "hard": Case(lambda: mlp(nn.Hardswish(), nn.Hardsigmoid(), nn.ELU()), vectors),
}  # fmt: skip
QUICK = ["pooled", "any length, channels first", "slopes", "smooth"]


def quick(names: Iterable[str], those: Collection[str]) -> list[Any]:
    """Parameters of which only those run by default."""
    return [n if n in those else pytest.param(n, marks=pytest.mark.slow) for n in names]


def ran(case: Case, spec: str) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = case.model()
    if any(isinstance(m, LazyModuleMixin) for m in model.modules()):
        model(case.x)
    return model, linearized(model, case.x, spec=spec, **case.options)


def assert_as_told(case: Case, model: nn.Module, module: Any) -> None:
    """Outputs are those of an evaluation by masks; the report counts what is compared."""
    other = drawn(*case.x.shape, seed=11)
    for x in (case.x, other[:3]):
        with torch.no_grad():
            got = module(x)
        want = blended(model, module, x, block=case.block, channel=case.channel)
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    told = section(module)
    compared = sum(comparisons(module, case.x).values())
    smooth = {"gelu", "silu", "sigmoid", "tanh"}
    assert compared == sum(s["kept"] for s in told["sites"] if s["op"] not in smooth)
    assert told["relus_after"] == sum(s["kept"] for s in told["sites"])
    assert told["relus_before"] == sum(s["total"] for s in told["sites"])
    assert compared_by(module) <= compared_by(graphopt.capture(model, (case.x,)))
    assert_error_told(case, model, module)


def assert_error_told(case: Case, model: nn.Module, module: Any) -> None:
    """The report's error is that of the module on the data."""
    with torch.no_grad():
        want, got = model(case.x), module(case.x)
    error = float((got - want).norm() / want.norm())
    assert section(module)["output_error"] == pytest.approx(error, rel=1e-3, abs=1e-6)


def compared_by(module: Any) -> set[str]:
    """Names of the comparing operators of a graph."""
    program = getattr(module, "program", module)
    packets = {getattr(node.target, "overloadpacket", None) for node in program.module.graph.nodes}
    return {p.__name__.rstrip("_") for p in packets if p in COMPARING}


@pytest.mark.parametrize("name", quick(CASES, QUICK))
def test_by_element(name: str) -> None:
    case = CASES[name]
    model, module = ran(case, "relus=25%,rounds=2")
    assert_as_told(case, model, module)
    told = section(module)
    unit = 5 if "any length" in name else 1  # a position stands for all places of a sequence
    pools = [s for s in told["sites"] if s["op"] == "max_pool" and s["kept"]]
    budget = told["relus_before"] // 4
    assert told["relus_after"] <= budget
    assert pools or told["relus_after"] > budget - unit
    assert any(0 < s["kept"] < s["total"] for s in told["sites"])


@pytest.mark.parametrize("granularity", ["channel", "site"])
@pytest.mark.parametrize(
    "name",
    quick(["vectors", "pooled", "signals", "tokens", "any length", "slopes"], ["pooled"]),
)
def test_by_channel_and_by_site(name: str, granularity: str) -> None:
    case = CASES[name]
    model, module = ran(case, f"relus=50%,rounds=2,granularity={granularity}")
    assert_as_told(case, model, module)
    for site in section(module)["sites"]:
        if granularity == "site":
            assert site["kept"] in (0, site["total"])
        elif 0 < site["kept"] < site["total"]:
            (coefficients,) = {
                v.shape[1] for k, v in module.state_dict().items() if f".{site['node']}." in k
            }
            assert site["kept"] % (site["total"] // coefficients) == 0


@pytest.mark.parametrize(
    "kind", quick(["identity", "affine", "poly2", "poly3", "poly4"], ["identity", "poly4"])
)
def test_every_replacement(kind: str) -> None:
    case = CASES["pooled"] if kind in ("identity", "affine") else CASES["images"]
    model, module = ran(case, f"relus=25%,rounds=1,replacement={kind}")
    assert_as_told(case, model, module)
    told = {s["choice"] for s in section(module)["sites"] if s["op"] == "relu"}
    assert told == {kind}
    degrees = {"identity": [], "affine": [2], "poly2": [3], "poly3": [4], "poly4": [5]}
    shapes = {
        v.shape[0] for k, v in module.state_dict().items() if "coefficients" in k and "relu" in k
    }
    assert sorted(shapes) == degrees[kind]


@pytest.mark.parametrize("select", ["random", "datafree"])
def test_other_ways_to_choose(select: str) -> None:
    case = CASES["images"]
    model, module = ran(case, f"relus=25%,rounds=2,select={select}")
    other = drawn(*images.shape, seed=11)
    assert torch.allclose(blended(model, module, other), module(other), atol=1e-5)
    assert sum(comparisons(module, images).values()) == section(module)["relus_before"] // 4


def test_slopes_of_tokens() -> None:
    """PReLU's slopes are along dimension 1, where a linear layer has no channels."""
    case = Case(lambda: tokens(nn.PReLU(5, 0.1), nn.ReLU()), sequences, **LAST)
    slopes = drawn(5, seed=1)
    model = case.model()
    with torch.no_grad():
        model[1].weight.copy_(slopes)  # type: ignore[index, union-attr, operator]
    assert_as_told(case, model, linearized(model, sequences, spec="relus=50%,rounds=1"))


def test_a_module_called_twice_is_two_sites() -> None:
    act = nn.ReLU()
    case = Case(lambda: mlp(act, act, act), vectors)
    model, module = ran(case, "relus=50%,rounds=1")
    assert len(section(module)["sites"]) == 3
    assert_as_told(case, model, module)


FORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "function": lambda s, x: s.b(F.relu(s.a(x))),
    "method": lambda s, x: s.b(s.a(x).relu()),
    "torch": lambda s, x: s.b(torch.relu(s.a(x))),
    "in place": lambda s, x: s.b(F.relu(s.a(x), inplace=True)),
    "method in place": lambda s, x: s.b(s.a(x).relu_()),
    "added in place": lambda s, x: s.b(s.a(torch.relu(s.a(x)) @ s.d).abs().mul(2).add_(1.0)),
    "added in place, to be kept": lambda s, x: s.b((lambda y: y.add_(torch.relu(y)))(s.a(x))),
    "residual in place": lambda s, x: s.b(
        (lambda y: y.add_(s.c(torch.relu(s.c(torch.relu(y))))))(s.a(x))
    ),
    "in a view": lambda s, x: s.b((lambda y: (y[:, :4].relu_(), y)[1])(s.a(x))),
    "written to a view": lambda s, x: s.b(
        (lambda y: (y[:, :4].add_(torch.relu(y[:, 4:])), torch.relu(y))[1])(s.a(x))
    ),
    "its result is written to": lambda s, x: s.b(
        (lambda y: (y[:, :4].add_(1.0), y)[1])(s.a(x).clamp(-0.3, 0.7))
    ),
    "the input is written to": lambda s, x: s.b(
        s.a((lambda y: (y[:, :4].add_(torch.abs(y[:, :4])), y)[1])(x)).clamp(0, 1)
    ),
    "of the input": lambda s, x: s.b(torch.relu(s.a(torch.relu(x)))),
    "in place of a clone": lambda s, x: s.b(s.a(x.clone().relu_()).relu()),
    "keywords": lambda s, x: s.b(torch.clamp(input=s.a(x), min=0.0, max=2.0)),
    "one bound": lambda s, x: s.b(s.a(x).clamp(min=0.0) + s.a(x).clamp_max(0.5)),
    "twice": lambda s, x: s.b(torch.relu(torch.relu(s.a(x)))),
}


PLAIN = [
    "function",
    "method",
    "torch",
    "method in place",
    "in place of a clone",
    "twice",
    "added in place",
    "added in place, to be kept",
    "of the input",
    "one bound",
]


@pytest.mark.parametrize("form", quick(FORMS, set(FORMS) - set(PLAIN)))
def test_forms_of_calls(form: str) -> None:
    """What can't be replaced stays with a reason; the rest is as the report says."""
    torch.manual_seed(0)
    model = Net(
        FORMS[form], a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(8, 8), d=torch.ones(8, 6)
    ).eval()
    before = vectors.clone()
    if form == "in a view":
        with pytest.raises(graphopt.BudgetInfeasible, match="writes in place"):
            linearized(model, vectors, spec="relus=50%,rounds=2")
        return
    module = linearized(model, vectors, spec="relus=50%,rounds=2")
    assert torch.equal(vectors, before)
    with torch.no_grad():
        want, got = model(vectors.clone()), module(vectors.clone())
    error = float((got - want).norm() / want.norm())
    assert section(module)["output_error"] == pytest.approx(error, rel=1e-3, abs=1e-6)
    assert error < 0.5
    compared = sum(comparisons(module, vectors.clone()).values())
    assert compared == section(module)["relus_after"] <= section(module)["relus_before"] // 2


def test_a_norm_called_twice() -> None:
    """Its statistics are one pair of tensors for both calls."""
    torch.manual_seed(0)
    model = settled(
        Net(
            lambda s, x: s.o(torch.relu(s.n(s.b(torch.relu(s.n(s.a(x))))))),
            a=nn.Linear(6, 8), b=nn.Linear(8, 8), n=nn.BatchNorm1d(8), o=nn.Linear(8, 3),
        )
    )  # fmt: skip
    case = Case(lambda: model, vectors)
    assert_as_told(case, *ran(case, "relus=25%,rounds=2,replacement=identity"))


class Branching(nn.Module):
    """A ReLU in front of sub-graphs that have some too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return torch.cond(x.sum() > 0, lambda y: self.b(y).relu(), lambda y: y.abs(), (y,))


def test_sites_in_sub_graphs_stay() -> None:
    model = Branching().eval()
    module = linearized(model, vectors, spec="relus=80%,rounds=1")
    sites = section(module)["sites"]
    inside = [s for s in sites if s["reason"] and "inside" in s["reason"]]
    assert {s["op"] for s in inside} >= {"relu", "abs"}
    assert all(s["kept"] == s["total"] for s in inside)
    with torch.no_grad():
        for x in (vectors.abs(), -vectors.abs()):
            assert bool(module(x).isfinite().all())
    with pytest.raises(graphopt.BudgetInfeasible):
        linearized(model, vectors, spec="relus=10%")

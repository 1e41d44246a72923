"""Softmax in attention replaced by 2Quad or by ReLUs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize_scalar
from torch import Tensor, fx, nn

import graphopt
from graphopt.errors import BudgetInfeasible, PipelineError, UnsupportedError
from graphopt.passes.linearize.softmax import prepared
from graphopt.private import comparisons
from tests.passes.linearize.attentions import FORMS, HEADS, LENGTH, WIDTH, attention, inputs
from tests.passes.linearize.nets import Net, drawn, linearized, section

KINDS = ("quad", "relu")


def forms(*quick: str) -> list[Any]:
    """All ways to write attention; those besides the named ones are slow."""
    return [f if f in quick else pytest.param(f, marks=pytest.mark.slow) for f in FORMS]


def outputs(module: Any, *args: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(*args)
    return result


def told(module: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = section(module)["softmaxes"]
    return found


# what is computed ---------------------------------------------------------------------------------


def heads(net: Any, x: Tensor, shared: int = 1) -> list[Tensor]:
    found = [p.unflatten(-1, (-1, WIDTH)).transpose(1, 2) for p in (net.q(x), net.k(x), net.v(x))]
    return [found[0], *(t.repeat_interleave(shared, 1) for t in found[1:])]


def oracle(net: Any, kind: str, centered: bool, scale: float, x: Tensor, counts: Tensor) -> Tensor:
    """The published formulas, in float64, with the offset that scipy finds."""
    net = copy.deepcopy(net).double()
    with torch.no_grad():
        q, k, v = heads(net, x.double())
        scores = q @ k.transpose(-1, -2) * scale
        keep = counts[:, None, None, :].expand_as(scores).double()
        wanted = scores.masked_fill(keep == 0, -math.inf).softmax(-1)
        if centered:
            scores = scores - (scores * keep).sum(-1, keepdim=True) / keep.sum(-1, keepdim=True)

        def normal(offset: float) -> Tensor:
            positive = (scores + offset).square() if kind == "quad" else scores.relu()
            positive = positive * keep  # eps is relative to the largest
            return positive / (positive.sum(-1, keepdim=True) + 1e-6 * positive.max())

        offset = 0.0
        if kind == "quad":
            loss = lambda c: float((normal(c) - wanted).square().sum())  # noqa: E731
            grid = [0.05 * i for i in range(1, 2000)]
            near = min(grid, key=loss)
            bounds = (near - 0.1, near + 0.1)
            best: Any = minimize_scalar(loss, bounds=bounds, method="bounded")
            offset = best.x
        mixed = normal(offset) @ v
        found: Tensor = net.out(mixed.transpose(1, 2).flatten(2)).float()
    return found


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", forms("summed", "one_op"))
def test_the_published_formula(form: str, kind: str, centered: bool) -> None:
    """However attention was written, what comes out is the formula with the best offset."""
    model, (x, counts) = attention(FORMS[form]), inputs()
    scale = 0.3 if form == "one_op_added" else 1 / math.sqrt(WIDTH)
    module = linearized(model, x, counts, spec=f"softmax={kind},centered={str(centered).lower()}")
    assert [s["choice"] for s in told(module)] == [kind]
    want = oracle(model, kind, centered, scale, x, counts)
    assert torch.allclose(outputs(module, x, counts), want, atol=2e-4)
    assert 0 < told(module)[0]["error"] < 1
    called = module.program.module.graph.nodes
    targets = {str(n.target) for n in called if n.op == "call_function"}
    assert not any("softmax" in t or "attention" in t for t in targets)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", forms("filled", "batched", "one_op_added"))
def test_masked_places_count_for_nothing(form: str, kind: str) -> None:
    model, (x, counts) = attention(FORMS[form]), inputs()
    module = linearized(model, x, counts, spec=f"softmax={kind}")
    got = outputs(module, x, counts)
    changed = torch.where(counts[..., None], x, 50 + 9 * x)
    other = outputs(module, changed, counts)
    assert torch.allclose(got[counts], other[counts], atol=1e-5)


class Grouped(nn.Module):
    """Everything that PyTorch's one op can be told."""

    def __init__(self, mask: str, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(6, 6)
        self.mask, self.options = mask, options

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        own = {"none": None, "bool": mask > 0, "float": mask}[self.mask]
        return F.scaled_dot_product_attention(self.project(q), k, v, own, **self.options)


@pytest.mark.parametrize(
    ("mask", "options", "shared"),
    [
        pytest.param("none", {}, 1, marks=pytest.mark.slow), ("bool", {"scale": 0.7}, 1),
        pytest.param("float", {}, 1, marks=pytest.mark.slow),
        pytest.param("none", {"is_causal": True}, 1, marks=pytest.mark.slow),
        pytest.param("bool", {"enable_gqa": True}, 2, marks=pytest.mark.slow),
        ("none", {"enable_gqa": True, "is_causal": True, "scale": 0.2}, 4),
    ],
)  # fmt: skip
def test_attention_written_out_is_attention(mask: str, options: Any, shared: int) -> None:
    """Before anything is replaced, against PyTorch's own; more keys than queries."""
    model = Grouped(mask, **options)
    args = (drawn(2, 4, 5, 6), drawn(2, 4 // shared, 8, 6), drawn(2, 4 // shared, 8, 3),
            drawn(2, 1, 5, 8, seed=9))  # fmt: skip
    if mask == "bool":
        args[3][0, 0, 1] = -1.0  # a row that is masked wholly
    program = graphopt.capture(model, args)
    ready = prepared(program, apart=True)
    assert len(ready.calls) == 1
    graph = ready.program.specialize(False)
    with torch.no_grad():
        (found,) = fx.Interpreter(graph).run(*program.signature.flatten_inputs(args, {}))
    assert torch.allclose(found, outputs(model, *args), atol=1e-5)
    for kind in KINDS:
        module = linearized(model, *args, spec=f"softmax={kind}")
        got = outputs(module, *args)
        assert bool(got.isfinite().all())
        if kind == "quad":
            want = outputs(model, *args)
            assert float((got - want).norm() / want.norm()) < 0.5
        if options.get("is_causal"):
            later = args[1].clone()
            later[:, :, 3:] += 5.0
            moved = outputs(module, args[0], later, *args[2:])
            assert torch.allclose(moved[:, :, :3], got[:, :, :3], atol=1e-5)
            assert not torch.allclose(moved[:, :, 3:], got[:, :, 3:], atol=1e-2)


def test_biases_weigh_as_they_do_in_a_softmax() -> None:
    """``exp(bias)`` is a factor of probabilities: of a constant score they are softmax(bias)."""
    bias = drawn(1, 1, 5, 8, seed=9) * 2 + 3

    class Flat(Grouped):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            return super().forward(0 * q, k, v, mask)

    model = Flat("float")
    nn.init.zeros_(model.project.bias)
    args = (drawn(2, 4, 5, 6), drawn(2, 4, 8, 6), drawn(2, 4, 8, 3), bias)
    module = linearized(model, *args, spec="softmax=quad")
    assert torch.allclose(outputs(module, *args), outputs(model, *args), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["one_op", "one_op_added", "filled"])
def test_rows_that_are_masked_wholly_give_zeros(form: str, kind: str) -> None:
    model, (x, counts) = attention(FORMS[form], head=False), inputs()
    module = linearized(model, x, counts, spec=f"softmax={kind}")
    counts = counts.clone()
    counts[1] = False
    x = x.clone().requires_grad_()
    got = module(x, counts)
    assert bool((got[1] == 0).all())
    assert bool(got.isfinite().all())
    got.square().sum().backward()
    assert bool(x.grad.isfinite().all())  # type: ignore[union-attr]


def test_rows_without_a_positive_score_give_zeros() -> None:
    model = Net(lambda net, q, k: torch.softmax(-1.0 - net.a(q).relu() @ k.abs().mT, -1) @ k,
                a=nn.Linear(4, 4))  # fmt: skip
    q, k = drawn(3, 5, 4), drawn(3, 6, 4, seed=4)
    published = linearized(model, q, k, spec="softmax=relu,centered=false")
    assert bool((outputs(published, q, k) == 0).all())
    centered = outputs(linearized(model, q, k, spec="softmax=relu"), q, k)
    assert bool(centered.isfinite().all())
    assert float(centered.abs().sum()) > 1


# counting and budgets -----------------------------------------------------------------------------


def block(head: nn.Module | None = None) -> nn.Module:
    """Attention, then a layer of ReLUs on it."""

    def forward(net: Any, x: Tensor, counts: Tensor) -> Tensor:
        return net.down(net.act(net.up(x + net.attend(x, counts))).mean(1))

    torch.manual_seed(2)
    inner = attention(FORMS["one_op"])
    inner.out = nn.Linear(HEADS * WIDTH, 12)
    return Net(
        forward, attend=inner, up=nn.Linear(12, 16), act=head or nn.ReLU(), down=nn.Linear(16, 3)
    ).eval()


def test_only_relus_are_added_and_they_are_counted() -> None:
    model, args = block(), inputs()
    before = sum(comparisons(model, *args).values())
    assert before == 16 * LENGTH
    quad = linearized(model, *args, spec="softmax=quad")
    assert sum(comparisons(quad, *args).values()) == before == section(quad)["relus_after"]
    relu = linearized(model, *args, spec="softmax=relu")
    extra = HEADS * LENGTH * LENGTH
    assert sum(comparisons(relu, *args).values()) == before + extra
    assert section(relu)["relus_after"] == before + extra
    assert section(relu)["relus_before"] == before
    assert [s["total"] for s in told(relu)] == [extra]


def test_relus_of_softmaxes_count_against_the_budget() -> None:
    model, args = block(), inputs()
    extra, own = HEADS * LENGTH * LENGTH, 16 * LENGTH
    module = linearized(model, *args, spec=f"softmax=relu,relus={extra + own // 2},rounds=1")
    assert section(module)["relus_after"] <= extra + own // 2
    count = sum(comparisons(module, *args).values())
    assert extra < count == section(module)["relus_after"]
    with pytest.raises(BudgetInfeasible, match="relus") as caught:
        linearized(model, *args, spec="softmax=relu,relus=50%")
    assert caught.value.smallest == extra
    assert "softmax=relu" in str(caught.value.obstacle)
    with pytest.raises(BudgetInfeasible, match="relu_sites"):
        linearized(model, *args, spec="softmax=relu,relu_sites=0")


def test_later_sites_are_fitted_behind_replaced_softmaxes() -> None:
    """A ReLU's polynomial is the least squares from what it now reads to what it gave."""
    model, args = block(), inputs(40)
    module = linearized(model, *args, spec="softmax=quad,relus=0,replacement=poly2,rounds=2")
    first = linearized(model, *args, spec="softmax=quad")
    seen: dict[str, Tensor] = {}

    def watch(which: str, program: Any) -> None:
        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                if n.name == "linear_4":
                    seen[which] = value
                return value

        with torch.no_grad():
            Watch(program.specialize(False)).run(*args)

    watch("now", first.program)
    watch("source", graphopt.capture(model, args).emit().program)
    assert not torch.allclose(seen["now"], seen["source"], atol=1e-3)
    state = module.state_dict()
    (name,) = (key for key in state if key.endswith("coefficients"))
    for channel in (0, 7):
        x, y = (seen[w][..., channel].flatten().double() for w in ("now", "source"))
        powers = torch.stack([x**0, x, x**2], 1)
        best = torch.linalg.lstsq(powers, y.relu()[:, None]).solution[:, 0]
        assert torch.allclose(state[name][:, channel].double(), best, atol=1e-3)


@pytest.mark.slow
def test_budgets_in_seconds_know_what_a_softmax_no_longer_costs() -> None:
    """The seconds that 2Quad saves are enough: no ReLU is replaced; and for less, some are."""
    from graphopt.private import predict

    model = block()
    args = (drawn(1, LENGTH, 12), torch.ones(1, LENGTH, dtype=torch.bool))
    model = Net(lambda net, x: net.inner(x, torch.ones(x.shape[:2], dtype=torch.bool)), inner=model)
    x = args[0]
    source = predict(model, "crypten", "wan", (x,)).seconds
    module = linearized(model, x, spec="softmax=quad,pi_latency=95%,network=wan")
    report = section(module)
    assert report["seconds_before"] == pytest.approx(source)
    assert report["seconds_after"] < 0.95 * source
    assert report["relus_after"] == report["relus_before"]
    less = linearized(model, x, spec=f"softmax=quad,pi_latency={report['seconds_after'] * 0.9},"
                                     "network=wan,rounds=1")  # fmt: skip
    assert section(less)["seconds_after"] <= 0.9 * report["seconds_after"]
    assert section(less)["relus_after"] < report["relus_after"]


# an ordinary module -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Any]:
    model = attention(FORMS["one_op"])
    args = inputs()
    return model, linearized(model, *args, spec="softmax=quad", dynamic="batch,sequence")


def test_state(pair: tuple[nn.Module, Any], tmp_path: Path) -> None:
    model, module = pair
    extra = set(module.state_dict()) - set(model.state_dict())
    assert extra == {f"_graphopt.{told(module)[0]['node']}.offset"}
    args = inputs()
    module.save(tmp_path / "saved")
    for other in (graphopt.load(tmp_path / "saved"), copy.deepcopy(module)):
        assert torch.equal(outputs(other, *args), outputs(module, *args))
        assert set(other.state_dict()) == set(module.state_dict())


def test_other_sizes(pair: tuple[nn.Module, Any]) -> None:
    model, module = pair
    for batch, length in ((2, 4), (1, 11)):
        x, counts = inputs(batch, length, seed=8)
        got = outputs(module, x, counts)
        assert got.shape == outputs(model, x, counts).shape
        alone = torch.cat([outputs(module, x[i : i + 1], counts[i : i + 1]) for i in range(batch)])
        assert torch.allclose(got, alone, atol=1e-5)


@pytest.mark.parametrize("form", ["one_op", "summed"])
def test_dropout_of_probabilities(form: str) -> None:
    """In training its mean is the result without; in eval mode nothing is drawn."""
    model, (x, counts) = attention(FORMS[form], head=False), inputs(2)
    module = linearized(model, x, counts, spec="softmax=quad")
    want = outputs(module, x, counts)
    assert torch.equal(outputs(module, x, counts), want)
    module.train()
    torch.manual_seed(0)
    drawn_ = torch.stack([outputs(module, x, counts) for _ in range(1500)])
    assert float(drawn_.std(0).mean()) > 0.02
    deviation = drawn_.std(0) / math.sqrt(1500) + 1e-4
    assert bool(((drawn_.mean(0) - want).abs() < 5 * deviation).all())
    assert torch.equal(outputs(module.eval(), x, counts), want)


def test_gradients(pair: tuple[nn.Module, Any]) -> None:
    module = copy.deepcopy(pair[1]).double()
    x, counts = inputs(2, 4)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda value: module(value, counts), (x,))
    module(x, counts).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    (offset,) = (p for n, p in module.named_parameters() if n.endswith("offset"))
    assert float(offset.grad.abs()) > 0  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(kind: str, dtype: torch.dtype) -> None:
    """Scores of hundreds, whose squares half precision doesn't hold."""
    model, (x, counts) = attention(FORMS["one_op"]), inputs()
    with torch.no_grad():
        model.q.weight *= 60.0  # type: ignore[union-attr, operator]
    module = linearized(model, x, counts, spec=f"softmax={kind}")
    want = outputs(module, x, counts)
    half = module.to(dtype)
    got = outputs(half, x.to(dtype), counts)
    assert got.dtype is dtype
    assert bool(got.isfinite().all())
    assert float((got.float() - want).norm() / want.norm()) < 0.05
    converted = linearized(model.to(dtype), x.to(dtype), counts, spec=f"softmax={kind}")
    assert bool(outputs(converted, x.to(dtype), counts).isfinite().all())


def test_the_source_and_the_generator_stay_as_they_were() -> None:
    model, args = block(), inputs()
    model.train()
    state = copy.deepcopy(model.state_dict())
    before = torch.random.get_rng_state()
    module = linearized(model, *args, spec="softmax=quad")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert module.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    again = linearized(model, *args, spec="softmax=quad")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in module.state_dict().items())


# what stays, and bad input ------------------------------------------------------------------------


def test_a_softmax_outside_of_attention_stays() -> None:
    model = Net(lambda net, x: (net.a(x).softmax(-1), net.b(x) @ x.mT.softmax(-1)),
                a=nn.Linear(4, 6), b=nn.Linear(4, 4))  # fmt: skip
    x = drawn(5, 3, 4)
    module = linearized(model, x, spec="softmax=quad")
    by_choice = {s["choice"]: s for s in told(module)}
    assert set(by_choice) == {"keep", "quad"}
    assert "no product" in by_choice["keep"]["reason"]
    assert torch.allclose(outputs(module, x)[0], outputs(model, x)[0])
    only = nn.Sequential(nn.Linear(4, 6), nn.Softmax(-1))
    same = linearized(only, drawn(5, 4), spec="softmax=quad")
    assert [s["choice"] for s in told(same)] == ["keep"]
    assert torch.equal(outputs(same, drawn(5, 4)), outputs(only, drawn(5, 4)))


def test_masks_that_are_not_understood_keep_their_softmax() -> None:
    def doubled(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        x = torch.where(counts, q @ k.mT, -3e4) * 2
        return x.softmax(-1) @ v

    def computed(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        x = (q @ k.mT + (counts.float() - 1) * 3e4) * 2
        return x.softmax(-1) @ v

    for attend in (doubled, computed):
        model, args = attention(attend), inputs()
        module = linearized(model, *args, spec="softmax=quad")
        assert [s["choice"] for s in told(module)] == ["keep"]
        assert "isn't understood" in told(module)[0]["reason"]
        assert torch.allclose(outputs(module, *args), outputs(model, *args), atol=1e-6)
        assert "_graphopt" not in " ".join(module.state_dict())
        published = linearized(model, *args, spec="softmax=relu,centered=false")
        assert [s["choice"] for s in told(published)] == ["relu"]


def _scaled_mask(net: Any, x: Tensor) -> Tensor:
    """Attention whose mask, a constant, is multiplied with the scores: it isn't understood."""
    q, k, v = heads(net, x)
    mask = torch.full((LENGTH, LENGTH), -3e4).triu(1)
    found = ((q @ k.mT + mask) * 2).softmax(-1) @ v
    result: Tensor = net.out(found.transpose(1, 2).flatten(2))
    return result


def test_what_a_softmax_that_stays_costs_is_not_forgotten() -> None:
    """That it has to stay shows at calibration, after all else was chosen."""
    from graphopt.private import predict

    parts = attention(FORMS["summed"])
    model, x = Net(_scaled_mask, q=parts.q, k=parts.k, v=parts.v, out=parts.out), inputs()[0]
    relu = linearized(model, x, spec="softmax=relu")
    assert [s["choice"] for s in told(relu)] == ["keep"]
    assert section(relu)["relus_after"] == 0
    source = predict(model, "crypten", "lan", (x,)).seconds
    with pytest.raises(BudgetInfeasible, match="pi_latency") as caught:
        linearized(model, x, spec="softmax=quad,pi_latency=90%")
    assert caught.value.smallest == pytest.approx(source)
    assert "isn't understood" in str(caught.value.obstacle)


def test_bad_options() -> None:
    model, args = attention(FORMS["one_op"]), inputs()
    with pytest.raises(PipelineError, match="cube"):
        linearized(model, *args, spec="softmax=cube")
    with pytest.raises(UnsupportedError, match="without data"):
        linearized(model, *args, spec="softmax=quad", data=None)


# real weights -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "least"), [("quad", 0.93), ("relu", 0.9)])
def test_sentence_embeddings(kind: str, least: float) -> None:
    """MiniLM, fitted to five sentences, on eight others: cosine with the source's embeddings."""
    from graphopt.private import predict
    from tests.zoo import ZOO
    from tests.zoo.pretrained import encoded

    model = ZOO["minilm"].model().eval()
    _, known = ZOO["minilm"].inputs(5)
    new = encoded(OTHERS)
    module = graphopt.optimize(
        model, None, example_kwargs=known, data=[known],
        passes=f"canonicalize,linearize{{softmax={kind}}}",
    )  # fmt: skip
    embedded = []
    for each in (model, module):
        with torch.no_grad():
            hidden, mask = each(**new)[0], new["attention_mask"][..., None].float()
        embedded.append((hidden * mask).sum(1) / mask.sum(1))
    assert float(F.cosine_similarity(*embedded).mean()) > least
    one = {name: value[:1] for name, value in new.items()}
    costs = [
        predict(m, "crypten", "lan", kwargs=one, public=("attention_mask", "_graphopt.*"))
        for m in (model, module)
    ]
    assert costs[1].rounds < 0.75 * costs[0].rounds
    assert costs[1].bytes < costs[0].bytes


OTHERS = [
    "The river flooded the valley after three days of rain.",
    "She plays the violin in the city orchestra.",
    "Interest rates rose again this quarter.",
    "My dog refuses to walk in the snow.",
    "Quantum computers factor large numbers in theory.",
    "He forgot his umbrella on the train.",
    "The recipe needs two eggs and a cup of sugar.",
    "Scientists discovered a new species of frog.",
]

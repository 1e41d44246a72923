"""The Pareto sweep: counts, costs and frontier, each by other means."""

from __future__ import annotations

import copy
import csv
import dataclasses
import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import registry
from graphopt.errors import BudgetError, PipelineError, UnsupportedError, UsageError
from graphopt.passes.linearize import Linearize, Point, Sweep, sweep
from graphopt.private import comparisons, predict
from tests.passes.linearize.nets import cnn, drawn, mlp, settled

IMAGES = [drawn(16, 3, 8, 8, seed=seed) for seed in range(2)]
EXAMPLE = IMAGES[0][:1]
BUDGETS = ("50%", "10%", "0", "relu_sites=1")
PROTOCOLS = ("crypten", "cheetah")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return cnn()


@pytest.fixture(scope="module")
def seen() -> list[nn.Module]:
    return []


@pytest.fixture(scope="module")
def swept(model: nn.Module, seen: list[nn.Module]) -> Sweep:
    """With the modules that were evaluated, by agreement with the source."""

    def evaluate(module: nn.Module) -> float:
        seen.append(module)
        return agreement(model, module)

    return sweep(
        model, (EXAMPLE,), data=iter(IMAGES), budgets=BUDGETS, protocols=PROTOCOLS,
        network="wan", evaluate=evaluate, time_limit=5.0,
    )  # fmt: skip


@torch.no_grad()
def agreement(model: nn.Module, module: nn.Module) -> float:
    same = [model(x).argmax(1) == module(x).argmax(1) for x in IMAGES]
    return float(torch.cat(same).double().mean())


def test_each_point_is_counted_priced_and_measured_as_its_module_is(
    model: nn.Module, swept: Sweep, seen: list[nn.Module]
) -> None:
    assert len(seen) == 1 + 2 * len(BUDGETS)
    assert len(swept.points) == len(PROTOCOLS) * len(seen)
    for index, point in enumerate(swept.points):
        module = seen[index // len(PROTOCOLS)]
        counted = comparisons(module, EXAMPLE)
        assert point.relus == sum(counted.values())
        assert point.relu_sites == len(counted)
        assert point.protocol == PROTOCOLS[index % len(PROTOCOLS)]
        cost = predict(module, point.protocol, "wan", (EXAMPLE,), public=("_graphopt.*",))
        assert (point.bytes, point.rounds) == (pytest.approx(cost.bytes), cost.rounds)
        assert point.seconds == pytest.approx(cost.seconds)
        assert point.accuracy == agreement(model, module)
    source = swept.points[0]
    assert source.is_source
    assert (source.relus, source.relu_sites, source.accuracy) == (480, 2, 1.0)


def test_a_point_is_what_optimize_gives(model: nn.Module, swept: Sweep) -> None:
    (point,) = [
        p for p in swept.points
        if (p.option, p.budget, p.protocol) == ("replacement=poly2", "10%", "crypten")
    ]  # fmt: skip
    passes = "canonicalize,linearize{relus=10%,replacement=poly2}"
    module = graphopt.optimize(model, None, (EXAMPLE,), passes=passes, data=IMAGES, time_limit=5.0)
    assert point.relus == module.report["linearize"]["relus_after"]
    assert point.accuracy == agreement(model, module)


@pytest.mark.parametrize("by", ["seconds", "relus", ("bytes", "rounds"), ("relu_sites",)])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_frontier_is_what_nothing_beats(swept: Sweep, by: Any, protocol: str) -> None:
    """Every pair is looked at; and many made-up points with ties."""
    generator = torch.Generator().manual_seed(0)
    drawn_ = torch.randint(0, 6, (60, 6), generator=generator).tolist()
    made_up = tuple(
        Point("o", "b", a, b, protocol, float(c), d, float(e), f / 5) for a, b, c, d, e, f in drawn_
    )
    hollow = Point("o", "b", protocol=protocol, reason="infeasible")
    for whole in (swept, dataclasses.replace(swept, points=(*made_up, hollow))):
        costs = [by] if isinstance(by, str) else list(by)
        points = [p for p in whole.points if p.protocol == protocol and p.accuracy is not None]

        def figures(point: Point, costs: list[str] = costs) -> list[float]:
            return [*(getattr(point, cost) for cost in costs), -(point.accuracy or 0.0)]

        beaten = {
            id(q)
            for p, q in itertools.permutations(points, 2)
            if all(a <= b for a, b in zip(figures(p), figures(q), strict=True))
            and any(a < b for a, b in zip(figures(p), figures(q), strict=True))
        }
        found = whole.frontier(by, protocol)
        assert {id(p) for p in found} == {id(p) for p in points} - beaten
        order = [figures(p)[0] for p in found]
        assert order == sorted(order)


def test_the_file_reads_back_as_the_points(swept: Sweep, tmp_path: Path) -> None:
    swept.to_csv(tmp_path / "frontier.csv")
    with open(tmp_path / "frontier.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    best = {id(p) for name in PROTOCOLS for p in swept.frontier(protocol=name)}
    for row, point in zip(rows, swept.points, strict=True):
        assert row.pop("network") == "wan"
        assert row.pop("frontier") == str(int(id(point) in best))
        for name, text in row.items():
            value = getattr(point, name)
            assert text == "" if value is None else type(value)(text) == value


def test_a_budget_that_cannot_be_kept_is_a_point_with_a_reason() -> None:
    class Fixed(nn.Module):
        """A site that stays, since it compares two values, beside one that can go."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(torch.maximum(self.one(x), self.two(x)))

    x = drawn(12, 6)
    found = sweep(
        settled(Fixed()), (x[:2],), data=[x], budgets=["75%", "25%"], options=[""], time_limit=5.0
    )
    kept, refused = found.points[1:]
    assert (kept.reason, kept.relus) == (None, 12)
    assert refused.reason is not None
    assert "smallest is 8" in refused.reason
    assert (refused.accuracy, refused.seconds, refused.relus) == (None, None, None)
    assert refused not in found.frontier()


def test_a_protocol_without_figures_leaves_the_rest(model: nn.Module) -> None:
    """Under homomorphic encryption nothing is compared, and squares have their figures."""
    found = sweep(
        model, (EXAMPLE,), data=IMAGES, budgets=["0"], options=["replacement=poly2"],
        protocols=["ckks"], time_limit=5.0,
    )  # fmt: skip
    source, replaced = found.points
    assert source.reason is not None
    assert (source.seconds, source.relus) == (None, 480)
    assert (replaced.reason, replaced.relus) == (None, 0)
    assert found.frontier() == (replaced,)


def test_a_limit_on_seconds_is_kept_under_each_protocol_apart(model: nn.Module) -> None:
    found = sweep(
        model, (EXAMPLE,), data=IMAGES, budgets=["pi_latency=80%"], protocols=PROTOCOLS,
        options=["replacement=affine"], network="wan", time_limit=5.0,
    )  # fmt: skip
    for name in PROTOCOLS:
        source, kept = (p for p in found.points if p.protocol == name)
        assert kept.seconds is not None
        assert kept.seconds <= 0.8 * (source.seconds or 0.0)


def test_a_share_of_seconds_that_nobody_knows_is_a_point_with_a_reason() -> None:
    """A source that compares has none under CKKS; the other protocol is swept all the same."""
    x = drawn(8, 6)
    found = sweep(
        mlp(), (x,), data=[x], budgets=["pi_latency=80%"], options=[""],
        protocols=["ckks", "crypten"],
    )  # fmt: skip
    none, other = (p for p in found.points if not p.is_source)
    assert (none.protocol, none.seconds) == ("ckks", None)
    assert none.reason == found.points[0].reason is not None
    assert (other.protocol, other.reason) == ("crypten", None)
    assert other.seconds is not None


def test_a_limit_on_seconds_over_a_link_of_ones_own() -> None:
    x, link = drawn(8, 6), "1e8,0.02"
    found = sweep(mlp(), (x,), data=[x], budgets=["pi_latency=80%"], options=[""], network=link)
    source, point = found.points
    assert source.seconds is not None
    assert point.seconds is not None
    assert source.seconds > predict(mlp(), "crypten", "lan", (x,)).seconds
    assert point.seconds <= 0.8 * source.seconds
    chosen = registry.parse(f'linearize{{pi_latency=80%,network="{link}"}}')
    assert registry.parse(str(chosen)) == chosen


def test_without_a_function_accuracy_is_agreement_or_likeness(model: nn.Module) -> None:
    options: dict[str, Any] = {
        "budgets": ["10%"], "options": ["replacement=affine"], "time_limit": 5.0
    }  # fmt: skip
    rows = sweep(model, (EXAMPLE,), data=IMAGES, **options)
    assert rows.measure == "agreement"
    passes = "canonicalize,linearize{relus=10%,replacement=affine}"
    module = graphopt.optimize(model, None, (EXAMPLE,), passes=passes, data=IMAGES)
    assert rows.points[1].accuracy == pytest.approx(agreement(model, module))
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    likeness = sweep(dense, (EXAMPLE,), data=IMAGES, **options)
    assert likeness.measure == "likeness"
    assert likeness.points[0].accuracy == 1.0
    assert 0 <= (likeness.points[1].accuracy or 0.0) < 1


def test_the_model_and_everything_around_it_stay(model: nn.Module) -> None:
    torch.manual_seed(3)
    before, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()

    def evaluate(module: nn.Module) -> float:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.zero_()  # the module is the function's own
        return 0.5

    model.train()
    try:
        found = sweep(model, (EXAMPLE,), data=IMAGES, budgets=["50%", "10%"], evaluate=evaluate)
        assert model.training
    finally:
        model.eval()
    assert [p.relus for p in found.points] == [480, 240, 48, 240, 48]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_ctrl_c_keeps_the_points_so_far(model: nn.Module) -> None:
    calls = itertools.count()

    def evaluate(module: nn.Module) -> float:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return 1.0

    found = sweep(
        model, (EXAMPLE,), data=IMAGES, budgets=("50%", "25%", "10%"), options=("",),
        evaluate=evaluate,
    )  # fmt: skip
    assert [point.budget for point in found.points] == ["", "50%"]
    assert found.interrupted
    assert found.to_dict()["interrupted"]


def test_what_makes_no_sense_is_refused_before_anything_runs(model: nn.Module) -> None:
    for error, word, options in (
        (UsageError, "nothing", {"budgets": []}),
        (BudgetError, "relus", {"budgets": ["many"]}),
        (PipelineError, "no option", {"options": ["kind=affine"]}),
        (UsageError, "nosuch", {"protocols": ["nosuch"]}),
        (UsageError, "network", {"network": "quick"}),
        (UsageError, "nan", {"evaluate": lambda module: float("nan")}),
    ):  # fmt: skip
        with pytest.raises(error, match=word):
            sweep(model, (EXAMPLE,), data=IMAGES, **options)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="without data"):
        sweep(mlp(), (drawn(4, 6),))


def test_the_chart_shows_every_point_and_no_label_covers_another(swept: Sweep) -> None:
    figure = swept.plot()
    figure.canvas.draw()
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["crypten, wan", "cheetah, wan", "count"]
    for axis, name, cost in zip(
        axes, (*PROTOCOLS, "crypten"), ("seconds", "seconds", "relus"), strict=True
    ):
        points = [p for p in swept.points if p.protocol == name]
        wanted = {(getattr(p, cost), 100 * (p.accuracy or 0.0)) for p in points}
        drawn_ = {
            tuple(map(float, pair))
            for line in axis.lines
            if line.get_linestyle() == "None" or line.get_marker() == "*"
            for pair in line.get_xydata().tolist()
        }
        shown_at = [value for place in sorted(drawn_) for value in place]
        assert shown_at == pytest.approx([value for place in sorted(wanted) for value in place])
        boxes = [text.get_window_extent() for text in axis.texts]
        assert boxes
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        shown = {text.get_text() for text in axis.texts}
        assert shown <= {*BUDGETS, "source"}


def test_a_chart_without_matplotlib_says_what_is_missing(
    swept: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        swept.plot()


def test_the_pass_offers_the_sweep_to_the_command_line() -> None:
    x = drawn(8, 6)
    found = Linearize.sweep(mlp(), (x,), data=[x], budgets=["50%"], time_limit=5.0)
    assert [p.budget for p in found.points] == ["", "50%", "50%"]

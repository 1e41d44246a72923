"""What notebooks show: well-formed, escaped, self-contained pieces of HTML, and figures."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import BudgetError, UnsupportedError, UsageError
from graphopt.inspect import diff, pareto, plot_frontier, plot_pareto
from graphopt.inspect.notebook import report_html
from graphopt.ir.capture import capture
from graphopt.ir.program import PassRecord
from graphopt.report import Report
from tests.zoo import ZOO

HOSTILE = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Fails on a tag that isn't closed; collects tags, attributes and cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def checked(text: str) -> Page:
    page = Page(text)
    assert not page.tags & {"script", "link", "img", "iframe", "style"}
    assert not page.attributes & {"src", "href", "onclick", "onload", "onerror", "id"}
    assert "http" not in text
    assert "url(" not in text
    return page


@pytest.fixture(scope="module")
def module() -> Any:
    model, args, kwargs = ZOO["mlp"]()
    return graphopt.optimize(
        model, "memory=100%", args, example_kwargs=kwargs, time_limit=2, verify=False
    )


def test_a_report_shows_its_passes_and_sections(module: Any) -> None:
    page = checked(module.report._repr_html_())
    data = module.report.to_dict()
    for name in [record.spec for record in module.report.passes]:
        assert name in page.words
    assert {"memory", "plan", "eager peak", "measured peak"} <= set(page.words)
    assert data["plan"]["status"] in page.words
    # Bars are as long as the bytes: eager's peak is the largest here.
    text = module.report._repr_html_()
    widths = [float(part.split("em")[0]) for part in text.split("width:")[1:] if "em" in part[:8]]
    assert max(widths) == 8.0
    assert len(text) < 100_000


def test_a_program_shows_its_inputs_nodes_and_code(module: Any) -> None:
    program = module.program
    page = checked(program._repr_html_())
    words = set(page.words)
    assert {"x", "f32[4, 20]", "fc1", "Linear", "aten.linear"} <= words
    code = next(word for word in page.words if word.startswith("def forward(state, x):"))
    assert "torch.ops.aten.linear.default" in code
    count = sum(node.op == "call_function" for node in program.module.graph.nodes)
    assert any(f"{count} nodes" in word for word in page.words)
    parameters = sum(p.numel() for p in module.parameters())
    assert any(f"{parameters / 1000:.3g} k parameters" in word for word in page.words)


def test_hostile_names_are_text() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module("<script>alert(1)<!--script>'", nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return next(iter(self.children()))(x)

    Named.__name__ = Named.__qualname__ = HOSTILE
    program = capture(Named(), (torch.rand(2, 4),))
    assert any("<script>" in word for word in checked(program._repr_html_()).words)
    record = PassRecord(
        HOSTILE, HOSTILE, True, {HOSTILE: {HOSTILE: HOSTILE, "list": [{HOSTILE: 1}]}}
    )
    page = checked(report_html(Report({HOSTILE: HOSTILE}, (record,))))
    assert HOSTILE in page.words
    other = capture(nn.Sequential(Named(), nn.ReLU()), (torch.rand(2, 4),))
    assert any("<script>" in word for word in checked(diff(program, other)._repr_html_()).words)


def test_long_code_is_cut_and_an_empty_report_is_fine() -> None:
    layers = [nn.Tanh() for _ in range(310)]
    program = capture(nn.Sequential(*layers), (torch.rand(2, 4),))
    text = program._repr_html_()
    checked(text)
    assert "lines more" in text
    assert len(text) < 100_000
    checked(Report()._repr_html_())


POINTS = [(4e6, 0.0, 0.0), (2e6, 0.5, 0.3), (3e6, 0.1, 0.1), (3e6, 0.2, 0.0), (1e6, 0.9, 0.2)]


def test_the_frontier_is_drawn_with_its_bound_and_budget() -> None:
    figure = plot_frontier(POINTS, budget="50%", measured=(2.1e6, 0.55), title="a net")
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["planned"] == [[1, 90], [2, 50], [3, 10], [4, 0]]
    # What is proven for two megabytes holds for one as well.
    assert lines["proven lower bound"] == [[1, 30], [2, 30], [3, 10], [4, 0]]
    assert {x for x, _ in lines["budget"]} == {2.0}
    assert lines["measured"] == [[2.1, pytest.approx(55)]]
    assert axes.get_xlabel() == "peak memory, MB"
    assert axes.get_title() == "a net"
    figure.canvas.draw()


def test_a_real_frontier_is_drawn() -> None:
    model, args, kwargs = ZOO["mlp"]()
    points = graphopt.frontier(model, args, example_kwargs=kwargs, budgets=3, time_limit=2)
    (axes,) = plot_frontier(points, budget=points[0][0]).axes
    drawn = next(line for line in axes.lines if line.get_label() == "planned")
    assert set(drawn.get_ydata()) <= {100 * overhead for _, overhead, _ in points}


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_pareto_points_are_those_that_none_beats(better: Any) -> None:
    torch.manual_seed(5)
    points = [(float(a), float(b)) for a, b in torch.randint(0, 12, (60, 2)).tolist()]
    sign = 1 if better == "higher" else -1

    def beats(one: Any, two: Any) -> bool:
        return one != two and one[0] <= two[0] and sign * one[1] >= sign * two[1]

    expected = {p for p in points if not any(beats(other, p) for other in points)}
    found = pareto(points, better)
    assert set(found) == expected
    assert found == sorted(found)
    figure = plot_pareto({"a": points, "b": [(1.0, 2.0)]}, cost="s", value="%", better=better)
    (axes,) = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines["a"] == [list(point) for point in found]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]


def test_dollars_in_titles_and_names_are_text() -> None:
    odd = "$x^{$ costs 5$"
    frontier = plot_frontier([(10.0, 0.5, 0.4), (5.0, 0.9, 0.9)], title=odd)
    names = plot_pareto({odd: [(1.0, 2.0)]}, cost=odd, value=odd, title=odd)
    for figure in (frontier, names):
        figure.draw_without_rendering()
        assert figure.axes[0].get_title() == odd


def test_bad_points_are_refused() -> None:
    with pytest.raises(UsageError, match="nothing"):
        plot_frontier([])
    with pytest.raises(UsageError, match="nothing"):
        plot_pareto({}, cost="s", value="%")
    with pytest.raises(UsageError, match="finite"):
        plot_frontier([(1.0, float("nan"), 0.0)])
    with pytest.raises(UsageError, match="2 finite"):
        plot_pareto({"a": [(1.0, 2.0, 3.0)]}, cost="s", value="%")  # type: ignore[list-item]
    with pytest.raises(BudgetError):
        plot_frontier(POINTS, budget="lots")


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: Any) -> None:
    for name in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match="matplotlib"):
        plot_frontier(POINTS)

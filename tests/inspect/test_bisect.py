"""Bisection: the first pass that breaks a check, and the first of its rewrites that does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt import registry
from graphopt.errors import UnsupportedError, UsageError
from graphopt.inspect import Bisect
from graphopt.inspect.rewrites import Replay
from graphopt.ir.capture import capture
from graphopt.ir.graphs import bind_graph
from graphopt.pipeline import Pass, PassContext, PassResult, Pipeline
from tests.zoo import ZOO

ATEN = torch.ops.aten


class Tower(nn.Module):
    """Six layers, each with its ReLU."""

    def __init__(self, depth: int = 6) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


@dataclass(frozen=True)
class Rewriting(Pass):
    """Writes every ReLU as a maximum with zero; number ``wrong`` with one half instead."""

    name: ClassVar[str] = "max-relu"

    wrong: int = -1
    breaks: bool = False

    def run(self, program: graphopt.Program, context: PassContext) -> PassResult:
        if self.breaks:
            raise KeyError("a third party's slip")
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.module.graph, {}))
        for index, node in enumerate(
            graph.find_nodes(op="call_function", target=ATEN.relu.default)
        ):
            floor = 0.5 if index == self.wrong else 0.0
            with graph.inserting_before(node):
                scaled = graph.call_function(ATEN.mul.Tensor, (node.args[0], 1.0))
                new = graph.call_function(ATEN.clamp.default, (scaled, floor))
            for made in (scaled, new):
                made.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        module = bind_graph(fx.GraphModule(program.module, graph), program.module)
        return PassResult(program.replace(module=module), True)


def setting(depth: int = 6) -> tuple[Any, Any, Any]:
    torch.manual_seed(3)
    model, x = Tower(depth), torch.randn(4, 5)
    expected = model(x).detach()
    return (
        capture(model, (x,)),
        PassContext((x,)),
        lambda module: torch.allclose(module(x), expected),
    )


@pytest.mark.parametrize("wrong", range(6))
def test_the_wrong_one_among_equal_rewrites_is_found(wrong: int) -> None:
    program, context, check = setting()
    asked: list[Any] = []

    def counted(module: Any) -> bool:
        asked.append(module)
        return check(module)

    bisect = Bisect(counted)
    canonicalize = registry.parse("canonicalize").passes
    pipeline = Pipeline((*canonicalize, Rewriting(wrong), *canonicalize))
    pipeline.run(program, context, [bisect])
    found = bisect.finding()
    assert found is not None
    assert found.index == 1
    assert found.position == (wrong + 1, 6)
    assert found.rewrite is not None
    name = "relu" if wrong == 0 else f"relu_{wrong}"
    assert [c.before.name for c in found.rewrite.changes if c.kind == "removed" and c.before] == [
        name
    ]
    clamp = {c.after for c in found.rewrite.changes if c.after and "clamp" in c.after.target}
    assert [entry.arguments for entry in clamp if entry] == ["%0, 0.5"]
    assert "test_bisect.py" in str(found)
    assert len(asked) <= 14
    # The programs on both sides of it differ in that rewrite alone.
    assert check(found.before.emit())
    assert found.after is not None
    assert not check(found.after.emit())


def test_nothing_is_blamed_where_nothing_breaks() -> None:
    program, context, check = setting()
    bisect = Bisect(check)
    Pipeline((Rewriting(), Rewriting())).run(program, context, [bisect])
    assert bisect.finding() is None


def test_a_check_may_raise_and_its_error_is_told() -> None:
    program, context, check = setting()

    def asserting(module: Any) -> None:
        assert check(module), "half is not zero"

    bisect = Bisect(asserting)
    Pipeline((Rewriting(2),)).run(program, context, [bisect])
    found = bisect.finding()
    assert found is not None
    assert isinstance(found.error, AssertionError)
    assert "half is not zero" in str(found)
    assert found.to_dict()["number"] == 3


def test_a_pass_that_raises_is_blamed() -> None:
    program, context, check = setting()
    bisect = Bisect(check)
    with pytest.raises(KeyError) as raised:
        Pipeline((Rewriting(), Rewriting(breaks=True))).run(program, context, [bisect])
    found = bisect.finding(raised.value)
    assert found is not None
    assert (found.index, found.rewrite, found.reason) == (1, None, "the pass itself raised")
    assert "slip" in str(found)


def test_a_check_that_fails_at_once_is_refused() -> None:
    program, context, _ = setting()
    bisect = Bisect(lambda module: False)
    Pipeline((Rewriting(),)).run(program, context, [bisect])
    with pytest.raises(UsageError, match="captured model already"):
        bisect.finding()


def test_a_check_that_trains_the_module_leaves_the_programs_alone() -> None:
    program, context, check = setting()
    weight = program.emit().state_dict()["layers.0.weight"].clone()

    def training(module: Any) -> bool:
        good = check(module)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
        return good

    bisect = Bisect(training)
    Pipeline((Rewriting(4),)).run(program, context, [bisect])
    found = bisect.finding()
    assert found is not None
    assert found.position == (5, 6)
    assert torch.equal(program.emit().state_dict()["layers.0.weight"], weight)


def test_a_plan_is_blamed_as_a_whole() -> None:
    model, args, kwargs = ZOO["mlp"]()
    bisect = Bisect(lambda module: module.program.planner is None)
    graphopt.optimize(
        model, None, args, example_kwargs=kwargs, passes="canonicalize,share", instruments=[bisect]
    )
    found = bisect.finding()
    assert found is not None
    assert found.pass_.name == "share"
    assert found.rewrite is None
    assert "planned" in found.reason


REPLAYED = [
    ("resnet", "canonicalize", 13),
    ("resnet", "canonicalize,linearize{relus=50%}", 0),
    ("resnet", "canonicalize,prune{flops=60%}", 0),
    ("no_grad_region", "canonicalize", 0),
    ("inplace_chain", "canonicalize", 5),
]


@pytest.mark.parametrize(("name", "passes", "count"), REPLAYED)
def test_replays_begin_and_end_as_the_programs_do(name: str, passes: str, count: int) -> None:
    model, args, kwargs = ZOO[name]()
    first = capture(model, args, kwargs)
    context = PassContext(args, kwargs, model, time_limit=3)
    pipeline = registry.parse(passes)
    *early, last = pipeline.passes
    before = Pipeline(tuple(early)).run(first, context) if early else first
    after = last.run(before, context).program
    replay = Replay(before, after)
    assert len(replay.rewrites) == count or (not count and replay.rewrites)

    def outputs(program: Any) -> list[Any]:
        module = program.emit().eval()
        torch.manual_seed(1)
        return program.signature.flatten_outputs(module(*args, **kwargs))

    for place, end in ((0, before), (len(replay.rewrites), after)):
        got, want = outputs(replay.program(place)), outputs(end)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    middle = replay.program(len(replay.rewrites) // 2)
    middle.module.graph.lint()
    if name != "no_grad_region":
        shapes = [t.shape for t in outputs(middle)]
        assert shapes == [t.shape for t in outputs(before)]


def test_the_sites_of_a_residual_network_are_told_apart() -> None:
    model, args, kwargs = ZOO["resnet"]()
    context = PassContext(args, kwargs, model)
    before = registry.parse("canonicalize").run(capture(model, args, kwargs), context)
    after = registry.parse("linearize{relus=50%}").run(before, context)
    sites = after.history[-1].report["linearize"]["sites"]
    replaced = {site["node"] for site in sites if site["choice"] != "keep"}
    alone = [w for w in Replay(before, after).rewrites if w.changes]
    gone = [{c.before.name for c in w.changes if c.before} & replaced for w in alone]
    assert all(len(names) == 1 for names in gone)
    assert set().union(*gone) == replaced
    assert len(alone) == len(replaced) > 5


def test_programs_of_other_signatures_are_not_replayed() -> None:
    programs = [capture(*ZOO[name]()) for name in ("mlp", "nested_outputs")]
    with pytest.raises(UnsupportedError, match="take or give"):
        Replay(*programs)

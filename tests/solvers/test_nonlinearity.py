"""Selections of non-linearities against exhaustive search, and what must hold for all of them."""

from __future__ import annotations

import _thread
import math
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, pairwise, product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.solvers.nonlinearity import (
    Edge,
    NonlinearityError,
    NonlinearityProblem,
    Option,
    Price,
    Selection,
    Site,
    by_greedy,
    by_order,
    by_random,
    check,
    select,
)

SMALL = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
RULES = (by_greedy, lambda p: by_random(p, 1), lambda p: by_order(p, range(len(p.sites))))

amounts = st.integers(0, 3)
prices = st.builds(Price, amounts, st.integers(0, 6), st.integers(0, 2))
damages = st.one_of(
    st.integers(0, 3).map(float), st.floats(0, 10, width=32), st.just(math.inf) | st.just(1.0)
)


@st.composite
def sites(draw: st.DrawFn, groups: int, name: str) -> Site:
    count = draw(st.integers(0, 2))
    options = tuple(
        Option(f"poly{r}", np.array(draw(st.lists(damages, min_size=groups, max_size=groups))),
               draw(prices))
        for r in range(count)
    )  # fmt: skip
    keep = draw(prices) if not options or draw(st.integers(0, 4)) else None
    return Site(name, groups, draw(st.integers(1, 3)), options, keep)


@st.composite
def problems(draw: st.DrawFn, most: int = 3) -> NonlinearityProblem:
    """Few small sites; ties, forbidden groups, fixed costs, paths, couplings, all limits."""
    count = draw(st.integers(1, most))
    sizes = draw(st.lists(st.integers(1, 3), min_size=count, max_size=count))
    coupled: tuple[tuple[int, ...], ...] = ()
    if count > 1 and draw(st.booleans()):
        pair = tuple(draw(st.permutations(range(count)))[:2])
        sizes[pair[1]] = sizes[pair[0]]
        coupled = (pair,)
    found = tuple(draw(sites(groups, f"s{s}")) for s, groups in enumerate(sizes))
    ends = st.tuples(st.integers(-1, count - 1), st.integers(0, count), st.integers(0, 2))
    edges = tuple(
        Edge(None if a < 0 else a, None if b == count else b, levels)
        for a, b, levels in draw(st.lists(ends, max_size=5))
        if a < b
    )
    elements = sum(site.groups * site.size for site in found)
    limit = draw(st.sampled_from(["relus", "cost", "max_depth", "relu_sites", "several"]))
    several = limit == "several"
    return NonlinearityProblem(
        found,
        relus=draw(st.integers(0, elements)) if several or limit == "relus" else None,
        relu_sites=draw(st.integers(0, count)) if limit == "relu_sites" else None,
        cost=draw(st.integers(0, 4 * elements)) if several or limit == "cost" else None,
        max_depth=draw(st.integers(0, 6)) if several or limit == "max_depth" else None,
        edges=edges,
        coupled=coupled,
    )


def treatments(site: Site) -> Iterator[tuple[frozenset[int], str | None, float, int, int, int]]:
    """(kept, option's name, damage, elements kept, cost, levels) of all that may become of it."""
    everything = frozenset(range(site.groups))
    for number in range(site.groups + 1):
        for chosen in combinations(range(site.groups), number):
            kept = frozenset(chosen)
            if kept and site.keep is None:
                continue
            keep = site.keep if kept and site.keep else Price()
            elements = len(kept) * site.size
            cost = keep.fixed + keep.element * elements
            if kept == everything:
                yield kept, None, 0.0, elements, cost, keep.levels
                continue
            for option in site.options:
                damage = math.fsum(option.damage[g] for g in everything - kept)
                extra = option.price.element * (site.groups * site.size - elements)
                levels = max(keep.levels, option.price.levels)
                total = cost + extra + option.price.fixed
                if damage < math.inf:
                    yield kept, option.name, damage, elements, total, levels


def longest(problem: NonlinearityProblem, levels: list[int]) -> int:
    """Over all paths, one by one."""

    def onwards(site: int) -> int:
        ways = [edge for edge in problem.edges if edge.before == site]
        ends = [e.levels + (0 if e.after is None else onwards(e.after)) for e in ways]
        return levels[site] + max(ends, default=0)

    starts = [onwards(site) for site in range(len(levels))]
    direct = [
        edge.levels + (0 if edge.after is None else onwards(edge.after))
        for edge in problem.edges
        if edge.before is None
    ]
    return max(starts + direct)


def least_damage(problem: NonlinearityProblem) -> float:
    """By trying everything; inf if nothing fits."""
    best = math.inf
    for combination in product(*(list(treatments(site)) for site in problem.sites)):
        kept, names, damage, elements, cost, levels = zip(*combination, strict=True)
        total = math.fsum(damage)
        together = all(
            kept[a] == kept[b] and names[a] == names[b]
            for a, *rest in problem.coupled
            for b in rest
        )
        if total < best and together and all(
            limit is None or used <= limit
            for limit, used in (
                (problem.relus, sum(elements)),
                (problem.relu_sites, sum(map(bool, kept))),
                (problem.cost, sum(cost)),
            )
        ):  # fmt: skip
            deep = problem.max_depth is not None and longest(problem, list(levels))
            if problem.max_depth is None or deep <= problem.max_depth:
                best = total
    return best


def assert_honest(problem: NonlinearityProblem, found: Selection) -> None:
    """Every figure is right, every limit is met, and the gap is what the bound says."""
    if not found.found:
        assert found.status in ("infeasible", "unknown")
        return
    assert check(problem, found).errors == ()
    assert all(kept.dtype == np.int64 for kept in found.kept)
    expected = (found.objective - found.bound) / found.objective if found.objective else 0.0
    assert found.gap == expected
    assert found.status == ("optimal" if found.gap <= 1e-9 else "feasible")


@SMALL
@given(problems())
def test_select_is_optimal(problem: NonlinearityProblem) -> None:
    best = least_damage(problem)
    found = select(problem, tolerance=0.0)
    assert_honest(problem, found)
    assert found.status == ("optimal" if best < math.inf else "infeasible")
    assert found.objective == pytest.approx(best, rel=1e-9)
    assert found.bound <= best * (1 + 1e-12)
    assert found.objective <= found.greedy_objective


@SMALL
@given(problems())
def test_rules_are_honest(problem: NonlinearityProblem) -> None:
    best = least_damage(problem)
    for rule in RULES:
        found = rule(problem)
        assert_honest(problem, found)
        assert found.objective >= best * (1 - 1e-12)


@st.composite
def plain(draw: st.DrawFn) -> NonlinearityProblem:
    """One option a site, groups of one size, one limit: where greedy is proven to be the best."""
    size = draw(st.integers(1, 3))
    found = []
    for s in range(draw(st.integers(1, 4))):
        values = draw(st.lists(st.floats(0, 10, width=32) | st.just(1.0), min_size=1, max_size=3))
        found.append(Site(str(s), len(values), size, (Option("affine", np.array(values)),)))
    total = sum(site.groups for site in found)
    return NonlinearityProblem(tuple(found), relus=draw(st.integers(0, total * size)))


@SMALL
@given(plain())
def test_greedy_is_optimal_for_one_limit_and_one_size(problem: NonlinearityProblem) -> None:
    found = by_greedy(problem)
    assert found.objective == pytest.approx(least_damage(problem), rel=1e-12)
    assert select(problem, tolerance=0.0).status == "optimal"


@settings(SMALL, max_examples=30)
@given(problems(most=2))
def test_more_budget_never_hurts(problem: NonlinearityProblem) -> None:
    for name, most in (("relus", problem.elements), ("cost", 30), ("relu_sites", 3)):
        limits = sorted({0, most // 4, most // 2, most})
        objectives = [
            select(replace(problem, **{name: limit}), tolerance=0.0).objective for limit in limits
        ]
        for less, more in pairwise(objectives):
            assert more <= less * (1 + 1e-9)


def generated(seed: int, count: int = 12, groups: int = 500) -> NonlinearityProblem:
    """Sites with two options each, fixed costs, a chain with levels."""
    random = np.random.default_rng(seed)
    found = []
    for s in range(count):
        affine = random.lognormal(random.normal(0, 1), 1.0, groups)
        poly = affine * random.uniform(0.05, 0.6)
        found.append(
            Site(f"s{s}", groups, 1, (
                Option("affine", affine), Option("poly2", poly, Price(16, 30_000, 1)),
            ), Price(464, 300_000, 6))
        )  # fmt: skip
    chain = tuple(Edge(s - 1 if s else None, s, 1) for s in range(count))
    return NonlinearityProblem(tuple(found), edges=chain)


@pytest.mark.parametrize("budget", [0.05, 0.1, 0.5])
def test_the_whole_budget_is_used(budget: float) -> None:
    problem = generated(0)
    limit = int(budget * problem.elements)
    for rule in (select, by_greedy, lambda p: by_random(p, 3)):
        found = rule(replace(problem, relus=limit))
        assert_honest(problem, found)
        assert found.relus == limit


def test_a_budget_of_nothing_replaces_everything() -> None:
    problem = replace(generated(1), relus=0)
    found = select(problem)
    assert found.status == "optimal"
    assert found.relus == found.relu_sites == 0
    assert found.options == (1,) * len(problem.sites)  # the polynomial is the better one


def test_without_a_limit_everything_is_kept() -> None:
    found = select(generated(1))
    assert found.status == "optimal"
    assert (found.objective, set(found.options)) == (0.0, {None})


@pytest.mark.parametrize(
    "limits",
    [
        {"relus": 900, "relu_sites": 4},
        {"cost": 2_500_000},
        {"relus": 3000, "cost": 2_000_000},
        {"relus": 1000, "max_depth": 30},
        {"relus": 2500, "relu_sites": 6, "cost": 2_500_000, "max_depth": 35},
    ],
)
def test_several_limits_are_closed_to_half_a_percent(limits: dict[str, int]) -> None:
    problem = replace(generated(2), **limits)
    found = select(problem, tolerance=5e-3, time_limit=60)
    assert_honest(problem, found)
    assert found.gap <= 5e-3
    assert found.objective <= found.greedy_objective


def test_greedy_is_beaten_where_rounds_cost() -> None:
    """A site's fixed cost pays for many groups or not at all, which no rule by density sees."""
    many = Site("many", 4, 1, (Option("affine", np.full(4, 3.0)),), Price(1, 6))
    one = Site("one", 1, 1, (Option("affine", np.full(1, 5.0)),), Price(1, 2))
    found = select(NonlinearityProblem((many, one, replace(one, name="two")), cost=10))
    assert found.status == "optimal"
    assert found.objective == 10.0  # `many` whole, 10 of 22
    assert [len(kept) for kept in found.kept] == [4, 0, 0]


def test_coupled_sites_choose_alike() -> None:
    left, right = np.array([9.0, 1.0, 5.0]), np.array([0.0, 6.0, 5.0])
    pair = tuple(Site(n, 3, 2, (Option("affine", d),)) for n, d in (("a", left), ("b", right)))
    found = select(NonlinearityProblem(pair, relus=4, coupled=((0, 1),)))
    assert [kept.tolist() for kept in found.kept] == [[2], [2]]  # 5 + 5 is the most together
    assert found.objective == 16.0


def test_forbidden_groups_are_kept() -> None:
    site = Site("a", 3, 1, (Option("affine", np.array([1.0, math.inf, 2.0])),))
    found = select(NonlinearityProblem((site,), relus=1))
    assert found.kept[0].tolist() == [1]
    assert select(NonlinearityProblem((site,), relus=0)).status == "infeasible"


def test_depth_is_that_of_the_longest_path() -> None:
    """Two branches: the short one has room for a polynomial of higher degree."""
    options = (Option("poly2", np.array([4.0]), Price(levels=1)),
               Option("poly4", np.array([1.0]), Price(levels=3)))  # fmt: skip
    chain = tuple(Site(n, 1, 8, options, None) for n in "abc")
    edges = (Edge(None, 0), Edge(0, 1, 1), Edge(1, None), Edge(None, 2), Edge(2, None))
    problem = NonlinearityProblem(chain, edges=edges, max_depth=3)
    found = select(problem)
    assert found.options == (0, 0, 1)
    assert (found.objective, found.depth) == (9.0, 3)
    assert select(replace(problem, max_depth=2)).status == "infeasible"


def test_same_seed_same_selection() -> None:
    problem = replace(generated(3, count=6), relus=700, relu_sites=3)
    one, other = (select(problem, time_limit=120, tolerance=1e-3) for _ in range(2))
    assert one.options == other.options
    assert all(np.array_equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))


def test_progress_improves_and_an_interrupt_keeps_the_incumbent() -> None:
    problem = replace(generated(4), relus=2500, relu_sites=6, cost=2_500_000, max_depth=35)
    seen: list[Selection] = []

    def note(selection: Selection) -> None:
        seen.append(selection)
        if len(seen) == 3:
            raise KeyboardInterrupt

    found = select(problem, progress=note, tolerance=0.0)
    assert_honest(problem, found)
    assert len(seen) == 3
    assert all(b.objective <= a.objective and b.bound >= a.bound for a, b in pairwise(seen))
    assert found.objective <= seen[-1].objective


def test_an_interrupt_from_outside_ends_the_work() -> None:
    problem = replace(generated(5, count=30), relus=5000, relu_sites=12, cost=7_000_000)
    timer = threading.Timer(1.5, _thread.interrupt_main)
    timer.start()
    found = select(problem, tolerance=0.0, time_limit=60)
    timer.cancel()
    assert_honest(problem, found)
    assert found.found
    assert found.seconds < 30


def test_culling_drops_whole_sites_in_the_order_given() -> None:
    problem = replace(generated(6, count=5), relus=1200)
    found = by_order(problem, [3, 0, 4, 1, 2])
    assert [len(kept) for kept in found.kept] == [0, 500, 500, 0, 0]
    assert by_order(problem, [3]).status == "unknown"


def test_random_depends_on_the_seed_alone() -> None:
    problem = replace(generated(7), relus=600, relu_sites=5)
    one, same, other = (by_random(problem, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one.kept, same.kept, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(one.kept, other.kept, strict=True))
    assert (one.relus, one.relu_sites) == (600, 5)


def test_random_spends_the_rest_on_small_groups() -> None:
    random.seed(0)
    sizes = [7, 5, 1]
    found = tuple(
        Site(str(s), 10, size, (Option("affine", np.ones(10)),)) for s, size in enumerate(sizes)
    )
    for limit in (1, 13, 60, 119):
        chosen = by_random(NonlinearityProblem(found, relus=limit), limit)
        assert chosen.relus == limit or len(chosen.kept[2]) == 10


def test_the_checker_sees_what_is_wrong() -> None:
    problem = replace(generated(8, count=3), relus=100)
    found = select(problem)
    more = (*found.kept[:2], np.arange(400))
    assert any("relus: " in error for error in check(problem, replace(found, kept=more)).errors)
    twice = (found.kept[0][[0, 0]], *found.kept[1:])
    assert any("repeat" in error for error in check(problem, replace(found, kept=twice)).errors)
    assert check(problem, replace(found, options=(None,) * 3)).errors
    assert check(problem, replace(found, objective=0.0)).errors
    assert check(problem, replace(found, bound=2 * found.objective)).errors


AFFINE = Option("affine", np.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Option("a", np.array([-1.0])), "numbers >= 0"),
        (lambda: Option("a", np.array([math.nan])), "numbers >= 0"),
        (lambda: Option("a", np.ones((2, 2))), "vector"),
        (lambda: Price(0.5), "whole number"),  # pyright: ignore[reportArgumentType]
        (lambda: Site("a", 3, 1, (AFFINE,)), "2 damages for 3 groups"),
        (lambda: Site("a", 2, 1, (AFFINE, AFFINE)), "same name"),
        (lambda: Site("a", 2, 0), "at least 1"),
        (lambda: Site("a", 2, 1, (), None), "neither kept nor replaced"),
        (lambda: NonlinearityProblem((Site("a", 2),), relus=-1), "relus"),
        (lambda: NonlinearityProblem((Site("a", 2),), cost=1.5), "cost"),  # pyright: ignore
        (lambda: NonlinearityProblem((Site("a", 2),), edges=(Edge(0, 1),)), "site 1"),
        (lambda: NonlinearityProblem((Site("a", 2),), edges=(Edge(0, 0),)), "cycle"),
        (
            lambda: NonlinearityProblem((Site("a", 2), Site("b", 3)), coupled=((0, 1),)),
            r"a \(2\), b \(3\)",
        ),
        (
            lambda: NonlinearityProblem((Site("a", 2), Site("b", 2)), coupled=((0, 1), (1,))),
            "twice",
        ),
        (lambda: NonlinearityProblem((Site("a", 2, 1, (), Price(2**53)),)), "larger unit"),
        (lambda: select(NonlinearityProblem(()), time_limit=0), "time_limit"),
        (lambda: by_order(NonlinearityProblem((Site("a", 2),)), [0, 0]), "not an order"),
    ],
)
def test_bad_input_is_named(make, message: str) -> None:
    with pytest.raises(NonlinearityError, match=message):
        make()


def test_no_site_at_all() -> None:
    found = select(NonlinearityProblem((), relus=0, cost=0, max_depth=0))
    assert (found.status, found.objective, found.kept) == ("optimal", 0.0, ())

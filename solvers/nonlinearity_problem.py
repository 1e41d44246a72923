"""Which non-linearities to keep: what is asked, and what comes back, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_LARGEST = 2**53  # costs are whole numbers; so large a total is still exact as a float


class NonlinearityError(ValueError):
    """A selection problem that makes no sense; the message says what to change."""


def _whole(amount: Any, what: str) -> int:
    if isinstance(amount, bool) or not isinstance(amount, int | np.integer) or amount < 0:
        raise NonlinearityError(f"{what} must be a whole number >= 0, not {amount!r}")
    return int(amount)


@dataclass(frozen=True)
class Price:
    """What it costs to compute a site in one way.

    Attributes:
        element: per element, in whole units of the problem's cost (bytes, picoseconds, ...).
        fixed: once for the site if any element is computed in this way (its rounds).
        levels: multiplicative levels that the way uses up, if any element is computed so.
    """

    element: int = 0
    fixed: int = 0
    levels: int = 0

    def __post_init__(self) -> None:
        """Checks for whole numbers that are not negative."""
        for name, amount in vars(self).items():
            _whole(amount, f"the price's {name}")


@dataclass(frozen=True, eq=False)
class Option:
    """A replacement that a site may get: identity, affine, a polynomial, ...

    One option replaces all groups of a site that aren't kept. Mixing options within a site needs
    no choice of its own: a polynomial of degree 2 contains the affine ones, so per-group
    coefficients already mix them, and the damage of the larger option is the elementwise minimum.

    Attributes:
        name: of the replacement; coupled sites match their options by it.
        damage: what the loss grows by if that group is replaced, (groups,), float64, not
            negative; inf where the option must not replace the group.
        price: of the replaced elements.
    """

    name: str
    damage: NDArray[np.float64]
    price: Price = Price()

    def __post_init__(self) -> None:
        """Keeps a read-only copy of the damages."""
        damage: NDArray[np.float64] = np.array(self.damage, np.float64)
        if damage.ndim != 1 or np.isnan(damage).any() or (damage < 0).any():
            raise NonlinearityError(
                f"option {self.name}: damage must be a vector of numbers >= 0 (or inf), not of "
                f"shape {damage.shape}, least {damage.min(initial=math.inf)}"
            )
        damage.setflags(write=False)
        object.__setattr__(self, "damage", damage)


@dataclass(frozen=True, eq=False)
class Site:
    """A non-linearity in the graph, whose groups are kept or replaced.

    Attributes:
        name: for people to read.
        groups: number of groups: elements, channels, or 1 for the whole site.
        size: elements (comparisons) in every group.
        options: replacements that may be chosen; none: the site stays as it is.
        keep: price of the kept elements; None: nothing can be kept (no comparisons in CKKS).
    """

    name: str
    groups: int
    size: int = 1
    options: tuple[Option, ...] = ()
    keep: Price | None = Price()

    def __post_init__(self) -> None:
        """Checks that the options speak of these groups."""
        if _whole(self.groups, f"{self.name}: groups") * _whole(self.size, "size") < 1:
            raise NonlinearityError(f"{self.name}: groups and size must be at least 1")
        if self.keep is None and not self.options:
            raise NonlinearityError(f"{self.name}: can be neither kept nor replaced")
        if len({option.name for option in self.options}) < len(self.options):
            raise NonlinearityError(f"{self.name}: two options have the same name")
        for option in self.options:
            if len(option.damage) != self.groups:
                raise NonlinearityError(
                    f"{self.name}: option {option.name} has {len(option.damage)} damages for "
                    f"{self.groups} groups"
                )


@dataclass(frozen=True)
class Edge:
    """A way through the network from one site to the next.

    Attributes:
        before: index of a site; None: the network's input.
        after: index of a site; None: the network's output.
        levels: used up in between, by linear layers.
    """

    before: int | None
    after: int | None
    levels: int = 0

    def __post_init__(self) -> None:
        """Checks the levels."""
        _whole(self.levels, "an edge's levels")


@dataclass(frozen=True, eq=False)
class NonlinearityProblem:
    """Which groups of which sites to keep: the least damage within every limit.

    Attributes:
        sites: what may be replaced.
        relus: most elements kept in all sites together; None: no limit.
        relu_sites: most sites with a kept element.
        cost: most that all prices may come to, in their unit.
        max_depth: most levels along any path.
        edges: how the sites follow each other, without a cycle. A site that no edge enters (or
            leaves) is taken to follow the input (lead to the output).
        coupled: sites that must make the same choice, kept groups included (one residual
            stream); disjoint. They have the same number of groups, and share the options whose
            names all of them have.
    """

    sites: tuple[Site, ...]
    relus: int | None = None
    relu_sites: int | None = None
    cost: int | None = None
    max_depth: int | None = None
    edges: tuple[Edge, ...] = ()
    coupled: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Checks the limits, the edges and the couplings."""
        for name in ("relus", "relu_sites", "cost", "max_depth"):
            if getattr(self, name) is not None:
                _whole(getattr(self, name), name)
        self._check_edges()
        self._check_coupled()
        if sum(map(_dearest, self.sites)) > _LARGEST:
            raise NonlinearityError("the costs exceed 2**53: use a larger unit")

    @property
    def elements(self) -> int:
        """Elements of all sites together."""
        return sum(site.groups * site.size for site in self.sites)

    def _check_edges(self) -> None:
        after: dict[int, list[int]] = {}
        for edge in self.edges:
            ends = [end for end in (edge.before, edge.after) if end is not None]
            self._known(ends, "an edge")
            if len(ends) == 2:
                after.setdefault(ends[0], []).append(ends[1])
        waiting = dict.fromkeys(range(len(self.sites)), 0)
        for ends in after.values():
            for end in ends:
                waiting[end] += 1
        ready = [site for site, count in waiting.items() if count == 0]
        for site in ready:
            for end in after.get(site, []):
                waiting[end] -= 1
                if waiting[end] == 0:
                    ready.append(end)
        if len(ready) < len(self.sites):
            raise NonlinearityError("the edges form a cycle")

    def _check_coupled(self) -> None:
        seen: set[int] = set()
        for together in self.coupled:
            self._known(together, "a coupling")
            if len(set(together)) < len(together) or seen & set(together):
                raise NonlinearityError("a site is coupled twice: join its couplings")
            seen |= set(together)
            if len({self.sites[site].groups for site in together}) > 1:
                names = ", ".join(
                    f"{self.sites[site].name} ({self.sites[site].groups})" for site in together
                )
                raise NonlinearityError(f"coupled sites differ in their groups: {names}")

    def _known(self, sites: Sequence[int], what: str) -> None:
        unknown = [site for site in sites if not 0 <= site < len(self.sites)]
        if unknown:
            raise NonlinearityError(f"{what} names site {unknown[0]}, which doesn't exist")


@dataclass(frozen=True, eq=False)
class Selection:
    """What every site becomes, and what is proven about it.

    Attributes:
        options: by site, the index of the option that replaces what isn't kept; None: all kept.
        kept: by site, the indices of the groups kept, int64, rising.
        objective: damage of all groups replaced; inf if "infeasible" or "unknown".
        bound: no selection within the limits has less damage; inf if "infeasible".
        gap: (objective - bound) / objective; inf if nothing was found.
        status: "optimal" (gap below 1e-9), "feasible", "infeasible" (proven), or "unknown" (no
            selection within the limits was found in time). The last two keep everything.
        seconds: time used.
        greedy_objective: damage of what `by_greedy` finds; inf if it finds nothing.
        relus: elements kept.
        relu_sites: sites with a kept element.
        cost: sum of the prices.
        depth: levels along the longest path.
    """

    options: tuple[int | None, ...]
    kept: tuple[NDArray[np.int64], ...]
    objective: float
    bound: float
    gap: float
    status: str
    seconds: float
    greedy_objective: float
    relus: int
    relu_sites: int
    cost: int
    depth: int

    @property
    def found(self) -> bool:
        """Whether this is a selection within the limits."""
        return math.isfinite(self.objective)


OnProgress = Callable[[Selection], None]


def _dearest(site: Site) -> int:
    """No choice at the site costs more."""
    prices = [option.price for option in site.options] + ([site.keep] if site.keep else [])
    elements = site.groups * site.size
    return elements * max(price.element for price in prices) + sum(p.fixed for p in prices)

"""Sites that choose alike because the user says so.

Nothing in the engines at hand couples sites: they run one node after the other, so that no two
share rounds, and folding an affine map through a residual sum asks nothing of other sites. What is
asked by name is one mask for several sites: the stages of a network that stay or go as a whole, or
the channels of a residual stream that are kept in all of its blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from graphopt.errors import UsageError
from graphopt.ir.mode import owner_of
from graphopt.passes.linearize.choice import Granularity, groups
from graphopt.passes.linearize.sites import Site


def coupled(
    sites: Sequence[Site], patterns: str, granularity: Granularity
) -> tuple[tuple[Site, ...], ...]:
    """Sites that patterns put together.

    Args:
        sites: Those that can be replaced.
        patterns: Separated by ``|``; each, with ``*``, names modules by the path of the innermost
            one that makes the call, or calls by their names in the graph. What one pattern names
            chooses alike; a site goes with the first that names it.
        granularity: What is kept or replaced as one.

    Raises:
        UsageError: A pattern names no site, or sites whose groups differ in number.
    """
    left, found = list(sites), []
    for pattern in (text.strip() for text in patterns.split("|")):
        together = [site for site in left if _named(site, pattern)]
        if not together:
            places = ", ".join(dict.fromkeys(owner_of(site.node) or site.name for site in left))
            raise UsageError(
                f"couple={pattern} names no non-linearity that is left",
                hint=f"there are some in {places}" if places else None,
            )
        counts = {site: int(groups(site, granularity).max()) + 1 for site in together}
        if len(set(counts.values())) > 1:
            told = ", ".join(f"{site.name} has {n}" for site, n in counts.items())
            raise UsageError(
                f"couple={pattern}: {granularity}s differ in number ({told})",
                hint="couple fewer, or with granularity=site",
                node=together[-1].node,
            )
        left = [site for site in left if site not in counts]
        found.append(tuple(together))
    return tuple(found)


def _named(site: Site, pattern: str) -> bool:
    return fnmatchcase(owner_of(site.node), pattern) or fnmatchcase(site.name, pattern)

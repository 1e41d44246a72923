"""Which passes there are.

Built-in passes live in the package `graphopt.passes`; third parties register theirs in the
entry-point group of the same name (``name = "package.module:PassClass"``, or a module).  Both are
found the same way: whatever a source module gives is searched for concrete `Pass` classes.  Nothing
else in graphopt knows a pass by its name.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from graphopt.budget import Budget
from graphopt.errors import PipelineError, UnsupportedError, suggest
from graphopt.pipeline import Pass, Pipeline

GROUP = "graphopt.passes"


@dataclass(frozen=True)
class Registered:
    """A pass that was found.

    Attributes:
        cls: Its class.
        origin: Where it was found: a module of the package or an entry point.
    """

    cls: type[Pass]
    origin: str


@dataclass(frozen=True)
class Catalogue:
    """What a search found: passes by name, and the sources that couldn't be imported."""

    passes: dict[str, Registered]
    broken: dict[str, str]


@functools.cache
def catalogue() -> Catalogue:
    """Find all passes; the result is kept until `refresh`.

    A source that fails to import is listed as broken and doesn't hide the others.

    Raises:
        PipelineError: Two different passes of the same name.
    """
    found: dict[str, Registered] = {}
    broken: dict[str, str] = {}
    for origin, load in _sources():
        try:
            loaded = load()
        except Exception as error:  # a third party's module may raise anything
            broken[origin] = f"{type(error).__name__}: {error}"
            continue
        for cls in _classes(loaded):
            other = found.setdefault(cls.name, Registered(cls, origin))
            if other.cls is not cls:
                raise PipelineError(
                    f"two passes are called {cls.name!r}: from {other.origin} and from {origin}",
                    hint="uninstall one of them or rename it",
                )
    return Catalogue(found, broken)


def refresh() -> None:
    """Forget what was found, so that the next call searches again."""
    catalogue.cache_clear()


def passes() -> dict[str, type[Pass]]:
    """All passes by name, in the order of their positions."""
    found = catalogue().passes
    ordered = sorted(found.values(), key=lambda r: (r.cls.position, r.cls.name))
    return {r.cls.name: r.cls for r in ordered}


def get(name: str) -> type[Pass]:
    """The pass called ``name``.

    Raises:
        PipelineError: There is none; suggests the closest name.
    """
    known = passes()
    if name in known:
        return known[name]
    for origin, reason in catalogue().broken.items():
        if origin.rpartition(".")[2] == name or origin.endswith(f":{name}"):
            raise PipelineError(f"pass {name!r} could not be imported: {reason}")
    listed = ", ".join(known) or "none"
    raise PipelineError(
        f"unknown pass {name!r}", hint=suggest(name, known) or f"known passes: {listed}"
    )


def serving(purpose: str) -> list[type[Pass]]:
    """Passes that serve a budget field, or ``"explanation"``, in the order of positions."""
    return [cls for cls in passes().values() if purpose in cls.serves]


def parse(text: str) -> Pipeline:
    """Read a pipeline text with the passes of the registry."""
    return Pipeline.parse(text, get)


def choose(budget: Budget) -> Pipeline:
    """The pipeline that serves ``budget``: what always runs, and what its fields ask for.

    Raises:
        UnsupportedError: No pass serves one of the fields.
    """
    wanted = {cls for cls in passes().values() if cls.always}
    for name in budget.limits():
        servers = serving(name)
        if not servers:
            raise UnsupportedError(
                f"no pass serves the budget {name}={budget.items()[name]}",
                hint="`graphopt passes` lists which pass serves what",
            )
        wanted.update(servers)
    ordered = [cls for cls in passes().values() if cls in wanted]
    return Pipeline(tuple(cls.from_budget(budget) for cls in ordered))


def rewrite(name: str) -> type[Any]:
    """The class of a rewrite that a saved plan uses, by its name.

    Raises:
        UnsupportedError: No installed pass has such a rewrite.
    """
    known = {cls.name: cls for pass_ in passes().values() for cls in pass_.rewrites}  # type: ignore[attr-defined]
    return _known(name, known, "uses the rewrite")


def planner(kind: str) -> type[Any]:
    """The planner class of a saved program, by its ``kind``.

    Raises:
        UnsupportedError: No installed pass has such a planner.
    """
    known = {cls.kind: cls for pass_ in passes().values() for cls in pass_.planners}  # type: ignore[attr-defined]
    return _known(kind, known, "is of the kind")


def _known(name: str, known: Mapping[str, type[Any]], what: str) -> type[Any]:
    if name not in known:
        raise UnsupportedError(
            f"this program's plan {what} {name!r}, which no installed pass knows",
            hint="install the package that made it",
        )
    return known[name]


def _sources() -> Iterator[tuple[str, Any]]:
    package = importlib.import_module(GROUP)
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{GROUP}.{module.name}"
        yield name, functools.partial(importlib.import_module, name)
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        yield f"{entry.value}:{entry.name}", entry.load


def _classes(loaded: Any) -> list[type[Pass]]:
    if isinstance(loaded, type):
        return [loaded] if _is_pass(loaded) else []
    if not isinstance(loaded, ModuleType):
        return []
    classes = [value for value in vars(loaded).values() if isinstance(value, type)]
    return [cls for cls in classes if _is_pass(cls) and cls.__module__.startswith(loaded.__name__)]


def _is_pass(cls: type) -> bool:
    return issubclass(cls, Pass) and bool(cls.name)

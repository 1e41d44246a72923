"""Composites: which rule is applied where, as an ordered list of matches."""

from __future__ import annotations

import dataclasses
import fnmatch
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import fx

from graphopt.errors import UnsupportedError, UsageError, suggest
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op
from graphopt.passes.relevance.rules import RULES, Rule

_FAMILIES = frozenset(f.value for f in Family)


@dataclass(frozen=True)
class Match:
    """What an operation has to be like; what is left open matches all.

    Attributes:
        family: Families of operators.
        op: Globs on the operator's name, such as ``"adaptive_*"``.
        path: Globs on the path of the module that it belongs to, such as ``"layers.*.mlp*"``.
        depth: Ends of the graph: ``first`` are linear layers and convolutions that read an
            attributed input (through operations without weights), ``last`` those that no other one
            comes after.
    """

    family: tuple[str, ...] = ()
    op: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    depth: Literal["any", "first", "last"] = "any"

    def __post_init__(self) -> None:
        for name in self.family:
            if name not in _FAMILIES:
                raise UsageError(
                    f"there is no family of operators {name!r}",
                    hint=suggest(name, _FAMILIES) or f"known: {', '.join(sorted(_FAMILIES))}",
                )

    def fits(self, op: Op, path: str, depths: frozenset[str]) -> bool:
        """Whether an operation is like that."""
        return (
            (not self.family or op.family.value in self.family)
            and (not self.op or any(fnmatch.fnmatchcase(op.name, p) for p in self.op))
            and (not self.path or any(fnmatch.fnmatchcase(path, p) for p in self.path))
            and (self.depth == "any" or self.depth in depths)
        )


@dataclass(frozen=True)
class Composite:
    """An ordered list of matches and rules; the first that fits wins.

    Attributes:
        name: Its name.
        entries: Pairs of a match and a rule.
    """

    name: str
    entries: tuple[tuple[Match, Rule], ...]

    def rule(self, op: Op, path: str, depths: frozenset[str]) -> Rule:
        """The rule for an operation.

        Raises:
            UnsupportedError: No entry fits.
        """
        for match, rule in self.entries:
            if match.fits(op, path, depths):
                return rule
        raise UnsupportedError(
            f"the composite {self.name!r} has no rule for operations of the family "
            f"{op.family.value!r}",
            node=op.node,
            hint="add an entry for it, or one without a match at the end",
        )

    def before(self, *entries: tuple[Match, Rule], name: str | None = None) -> Composite:
        """A composite whose entries come in front of these."""
        return Composite(self.name if name is None else name, (*entries, *self.entries))

    def to_toml(self) -> str:
        """The composite as TOML, which `from_toml` reads."""
        lines = [f"name = {_toml(self.name)}"]
        for match, rule in self.entries:
            lines += ["", "[[entry]]"]
            for field in dataclasses.fields(Match):
                value = getattr(match, field.name)
                if value != field.default:
                    lines.append(f"{field.name} = {_toml(value)}")
            lines.append(f"rule = {_toml(rule.name)}")
            lines += [f"{key} = {_toml(value)}" for key, value in rule.options().items()]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, text: str) -> Composite:
        """Read a composite.

        Raises:
            UsageError: It isn't TOML, or names a rule, an option or a family that doesn't exist.
        """
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise UsageError(f"the composite isn't TOML: {error}") from error
        unknown = sorted(set(data) - {"name", "entry"})
        if unknown:
            raise UsageError(f"a composite has no {unknown[0]!r}", hint="it has name and entry")
        entries = data.get("entry", [])
        return cls(str(data.get("name", "composite")), tuple(_entry(e) for e in entries))


def _entry(data: Mapping[str, Any]) -> tuple[Match, Rule]:
    options = dict(data)
    name = options.pop("rule", None)
    if name not in RULES:
        raise UsageError(
            f"there is no rule {name!r}",
            hint=suggest(str(name), RULES) or f"known: {', '.join(sorted(RULES))}",
        )
    fields = {f.name for f in dataclasses.fields(Match)}
    match: dict[str, Any] = {k: _frozen(options.pop(k)) for k in list(options) if k in fields}
    match = {k: (v,) if k != "depth" and isinstance(v, str) else v for k, v in match.items()}
    known = [f.name for f in dataclasses.fields(RULES[name])]
    for key in options:
        if key not in known:
            raise UsageError(
                f"the rule {name!r} has no option {key!r}",
                hint=suggest(key, known) or f"it has: {', '.join(known) or 'none'}",
            )
    try:
        return Match(**match), RULES[name](**{k: _frozen(v) for k, v in options.items()})
    except (TypeError, ValueError) as error:
        raise UsageError(f"the rule {name!r}: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return "[" + ", ".join(_toml(v) for v in value) + "]"


def path_of(node: fx.Node) -> str:
    """Path of the innermost module that a call belongs to."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return str(stack[-1][0]) if stack else ""


def depths(ops: Sequence[Op]) -> dict[Op, frozenset[str]]:
    """Which ends of the graph each operation with weights stands at."""
    weighted = (Family.LINEAR, Family.CONV)
    behind: dict[fx.Node, bool] = {}  # whether something with weights comes before a value
    for op in ops:
        before = any(behind.get(o, False) for o in op.operands)
        behind[op.node] = before or op.family in weighted
    ahead: set[fx.Node] = set()
    found: dict[Op, frozenset[str]] = {}
    for op in reversed(ops):
        after = op.node in ahead
        if after or op.family in weighted:
            ahead.update(op.operands)
        if op.family in weighted:
            first = not any(behind.get(o, False) for o in op.operands)
            ends = ("first" if first else "", "" if after else "last")
            found[op] = frozenset(e for e in ends if e)
    return found


def matches(families: Iterable[Family], rule: Rule, **match: Any) -> tuple[Match, Rule]:
    """An entry for some families."""
    return Match(family=tuple(f.value for f in families), **match), rule

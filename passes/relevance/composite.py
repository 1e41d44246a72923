"""Composites: which rule is applied where, as an ordered list of matches."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx

from graphopt.errors import UnsupportedError, UsageError, suggest
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op
from graphopt.passes.relevance.rules import RULES, PatternAttribution, PatternNet, Rule

_FAMILIES = frozenset(f.value for f in Family)
_DEPTHS = ("any", "first", "last")
_OPERANDS = frozenset({"data x data", "data x param", "data"})
_OF_ONE_VALUE = (Family.ACTIVATION, Family.NORM, Family.SOFTMAX)
_NAMES = {"family": "family of operators", "role": "role of operands"}


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
        role: What is multiplied: ``data x data``, ``data x param``, or ``data`` alone.
    """

    family: tuple[str, ...] = ()
    op: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    depth: Literal["any", "first", "last"] = "any"
    role: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("family", "op", "path", "role"):
            values = getattr(self, field)
            if not isinstance(values, tuple) or not all(isinstance(v, str) for v in values):
                raise UsageError(f"{field} = {values!r} in a match", hint="it is a list of names")
        for field, known in (("family", _FAMILIES), ("role", _OPERANDS)):
            for name in getattr(self, field):
                if name not in known:
                    raise UsageError(
                        f"there is no {_NAMES[field]} {name!r}",
                        hint=suggest(name, known) or f"known: {', '.join(sorted(known))}",
                    )
        if self.depth not in _DEPTHS:
            raise UsageError(
                f"there is no depth {self.depth!r}",
                hint=suggest(str(self.depth), _DEPTHS) or f"known: {', '.join(_DEPTHS)}",
            )

    def fits(self, op: Op, path: str, depths: frozenset[str]) -> bool:
        """Whether an operation is like that."""
        return (
            (not self.family or op.family.value in self.family)
            and (not self.op or any(fnmatch.fnmatchcase(op.name, p) for p in self.op))
            and (not self.path or any(fnmatch.fnmatchcase(path, p) for p in self.path))
            and (not self.role or _operands(op) in self.role)
            and (self.depth == "any" or self.depth in depths)
        )


@dataclass(frozen=True)
class Composite:
    """An ordered list of matches and rules; the first that fits wins.

    Attributes:
        name: Its name.
        entries: Pairs of a match and a rule.
        patterns: Patterns by the name of the weight, for rules that need them (see
            `graphopt.passes.relevance.patterns.fit`); TOML doesn't hold them.
    """

    name: str
    entries: tuple[tuple[Match, Rule], ...]
    patterns: Mapping[str, Tensor] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def rule(self, op: Op, path: str, depths: frozenset[str]) -> Rule:
        """The rule for an operation.

        Raises:
            UnsupportedError: No entry fits.
            UsageError: The first one that does has a rule for other operations.
        """
        for match, rule in self.entries:
            if match.fits(op, path, depths):
                return _checked(rule, op)
        raise UnsupportedError(
            f"the composite {self.name!r} has no rule for operations of the family "
            f"{op.family.value!r}",
            node=op.node,
            hint="add an entry for it, or one without a match at the end",
        )

    def before(self, *entries: tuple[Match, Rule], name: str | None = None) -> Composite:
        """A composite whose entries come in front of these."""
        name = self.name if name is None else name
        return dataclasses.replace(self, name=name, entries=(*entries, *self.entries))

    def stabilised(self, eps: float, stabiliser: str = "rms") -> Composite:
        """The composite with another stabiliser in all rules that have one.

        ``stabilised(1e-6, "sign")`` is what zennit adds.

        Args:
            eps: How far sums are moved away from zero.
            stabiliser: What it is relative to, see `Site.stabilised`.
        """

        def changed(rule: Rule) -> Rule:
            names = {f.name for f in dataclasses.fields(rule)}
            given: dict[str, Any] = {"eps": eps, "stabiliser": stabiliser}
            return dataclasses.replace(rule, **given) if {"eps", "stabiliser"} <= names else rule

        return dataclasses.replace(self, entries=tuple((m, changed(r)) for m, r in self.entries))

    def with_patterns(self, patterns: Mapping[str, Tensor]) -> Composite:
        """The composite with patterns for the rules that need them."""
        return dataclasses.replace(self, patterns=patterns)

    @property
    def lacks_patterns(self) -> bool:
        """Whether a rule needs patterns that it hasn't got."""
        needs = any(isinstance(r, PatternAttribution | PatternNet) for _, r in self.entries)
        return needs and self.patterns is None

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
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise UsageError("entry isn't a list of tables", hint="each one starts with [[entry]]")
        if not entries:
            raise UsageError("a composite without entries has no rules")
        return cls(str(data.get("name", "composite")), tuple(_entry(e) for e in entries))


def _checked(rule: Rule, op: Op) -> Rule:
    if rule.families and op.family not in rule.families:
        raise UsageError(
            f"the rule {rule.name!r} isn't for operations of the family {op.family.value!r}",
            node=op.node,
            hint=f"it is for {', '.join(f.value for f in rule.families)}",
        )
    if rule.families and op.family in _OF_ONE_VALUE and not _is_of_one_value(op):
        raise UnsupportedError(
            f"what sets {op.name!r} (a scale, a bound, an exponent) depends on the input as well",
            node=op.node,
            hint="write it as products and sums, or use 'as-gradient' here",
        )
    return rule


def _is_of_one_value(op: Op) -> bool:
    """Whether relevance can only go to the value that a function or a norm is of."""
    is_value = op.family is not Family.NORM or op.argument(0) in op.operands
    return len(op.operands) == 1 and is_value


def _operands(op: Op) -> str:
    """What an operation multiplies."""
    if op.family in (Family.PRODUCT, Family.ATTENTION):
        return "data x data"
    return "data x param" if op.family in (Family.LINEAR, Family.CONV, Family.SCALE) else "data"


def _entry(data: Mapping[str, Any]) -> tuple[Match, Rule]:
    options = dict(data)
    name = options.pop("rule", None)
    if name is None:
        raise UsageError("an entry without a rule", hint='rule = "epsilon", for example')
    if not isinstance(name, str) or name not in RULES:
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
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
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

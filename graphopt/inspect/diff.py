"""The difference of two programs, node by node.

Nodes are paired by identity (see `graphopt.inspect.align`), so that a renamed node is no change,
and an inserted one doesn't change those behind it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from graphopt.errors import UnsupportedError
from graphopt.inspect.align import align
from graphopt.inspect.document import Binding, Document, Result, Segment, Slot
from graphopt.inspect.entries import Entry, Listing, listing, listing_of_dump
from graphopt.ir.program import Program

if TYPE_CHECKING:
    from rich.text import Text

SCHEMA_VERSION = 1

Kind = Literal["added", "removed", "changed", "rewired"]
Comparable = Program | nn.Module | Document | Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A node that isn't the same in both graphs.

    Attributes:
        kind: ``added`` or ``removed``; ``changed``: another op, other arguments, type or phase,
            or parameters of other types; ``rewired``: only the operands are others.
        before: The node in the first graph, or None.
        after: The node in the second graph, or None.
        fields: What differs: ``op``, ``arguments``, ``operands``, ``state`` (the types of the
            parameters read), ``type``, ``phase`` -> texts before and after.
    """

    kind: Kind
    before: Entry | None
    after: Entry | None
    fields: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def entry(self) -> Entry:
        """The node, as it is afterwards if it still is."""
        found = self.after or self.before
        assert found is not None
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "kind": self.kind,
            "before": None if self.before is None else self.before.to_dict(),
            "after": None if self.after is None else self.after.to_dict(),
            "fields": {name: list(texts) for name, texts in self.fields.items()},
        }


@dataclass(frozen=True)
class StateChange:
    """A parameter, buffer or constant that isn't the same.

    Attributes:
        path: Its path.
        kind: ``added``, ``removed``, ``type`` or ``values``.
        before: Its type before, or empty.
        after: Its type afterwards, or empty.
    """

    path: str
    kind: Literal["added", "removed", "type", "values"]
    before: str
    after: str

    def to_dict(self) -> dict[str, str]:
        """JSON-able form."""
        return dict(vars(self))


@dataclass(frozen=True)
class Diff:
    """How a graph differs from another; false if it doesn't.

    Attributes:
        changes: The nodes that aren't the same, in the order of the graphs.
        state: The parameters, buffers and constants that aren't the same.
        pairs: Names of the nodes that both have: name in the first -> name in the second.
        before: The first graph.
        after: The second graph.
    """

    changes: tuple[Change, ...]
    state: tuple[StateChange, ...]
    pairs: Mapping[str, str] = field(repr=False)
    before: Listing = field(repr=False)
    after: Listing = field(repr=False)

    def __bool__(self) -> bool:
        return bool(self.changes or self.state)

    def names(self, *kinds: Kind) -> set[str]:
        """Names of the nodes with these kinds of change (default: all), as they are afterwards."""
        return {c.entry.name for c in self.changes if not kinds or c.kind in kinds}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: ``schema_version``, ``equal``, ``unchanged``, ``changes``, ``state``."""
        both = sum(c.before is not None and c.after is not None for c in self.changes)
        return {
            "schema_version": SCHEMA_VERSION,
            "equal": not self,
            "unchanged": len(self.pairs) - both,
            "changes": [change.to_dict() for change in self.changes],
            "state": [change.to_dict() for change in self.state],
        }

    def text(self, context: int = 1) -> str:
        """As plain text; empty if there is no difference."""
        return self.coloured(context).plain

    def coloured(self, context: int = 1) -> Text:
        """As a `rich` text: removed red, added green, rewired yellow.

        Args:
            context: How many unchanged nodes are shown around a change.
        """
        from graphopt.inspect.patch import patch

        return patch(self, context)

    def __str__(self) -> str:
        return self.text()

    def __rich__(self) -> Text:
        return self.coloured()

    def _repr_html_(self) -> str:
        from graphopt.inspect.patch import patch_html

        return patch_html(self)


def diff(
    before: Comparable, after: Comparable, *, view: str = "program", training: bool = True
) -> Diff:
    """Compare two graphs node by node.

    Args:
        before: A program, an optimised module, a `Document`, or the data of a JSON dump.
        after: The same; of a dump and a program, only what a dump holds is compared.
        view: Of programs: ``program`` (the forward graph), ``joint`` (with the backward graph),
            ``plan`` (the stages of a planned step; the joint graph of what has no plan).
        training: Mode that is compared: where there are two graphs, the second if not; and the mode
            of joint graphs and plans.

    Returns:
        The difference; it is false (``bool(...)``) if there is none.  Values of tensors are
        compared where both sides hold them.

    Raises:
        UnsupportedError: No such view, or something that has none.
        FileFormatError: The data isn't that of a dump.
    """
    if isinstance(before, Mapping) != isinstance(after, Mapping):
        before, after = (_dumped(side, view, training) for side in (before, after))
    return compare(_listing(before, view, training), _listing(after, view, training))


def compare(before: Listing, after: Listing) -> Diff:
    """Compare two listings (see `diff`)."""
    pairs = align(before.entries, after.entries)
    changes = tuple(_changes(before, after, pairs))
    return Diff(changes, tuple(_state_changes(before, after)), pairs, before, after)


def folded(program: Program) -> Listing:
    """The forward graph of a program with its sub-graphs in one piece."""
    return listing(plain_document(program), folded=True)


def plain_document(program: Program, training: bool = True) -> Document:
    """The forward graph of a program as it is captured, with the mode-bearing ops as they are."""
    second = program.eval_module is not None and not training
    module = program.eval_module if second else program.module
    assert module is not None
    signature = (program.eval_signature if second else None) or program.signature
    leaves = signature.inputs
    holders = module.graph.find_nodes(op="placeholder")
    bindings = {n: Binding("input", leaf.name) for n, leaf in zip(holders, leaves, strict=True)}
    values = module.graph.output_node().args[0]
    flat = list(values) if isinstance(values, (list, tuple)) else [values]
    results = tuple(Result("output", str(index), value) for index, value in enumerate(flat))
    segment = Segment("forward", module, bindings, results)
    slots = tuple(Slot(leaf.name, tuple(leaf.shape), leaf.dtype) for leaf in leaves)
    return Document("program", "", slots, (), {}, (segment,), len(flat))


def _program_of(side: Any) -> Program:
    program = side if isinstance(side, Program) else getattr(side, "program", None)
    if not isinstance(program, Program):
        raise UnsupportedError(
            f"a {type(side).__name__} has no graph to compare",
            hint="capture it first: graphopt.capture(model, example_inputs)",
        )
    return program


def _document(side: Any, view: str, training: bool) -> Document:
    from graphopt.inspect.views import document

    if isinstance(side, Document):
        return side
    program = _program_of(side)
    if view == "program":
        return plain_document(program, training)
    if view == "plan" and program.planner is None:
        view = "joint"
    return document(program, view, training=training)


def _listing(side: Any, view: str, training: bool) -> Listing:
    if isinstance(side, Mapping):
        return listing_of_dump(side)
    return listing(_document(side, view, training))


def _dumped(side: Any, view: str, training: bool) -> Mapping[str, Any]:
    """A side as the data of a JSON dump, which shows the specialized graph."""
    if isinstance(side, Mapping):
        return side
    from graphopt.inspect import json_text
    from graphopt.inspect.views import document

    shown = side
    if not isinstance(side, Document):
        shown = document(_program_of(side), view, training=training)
    return json.loads(json_text(shown))


def _changes(before: Listing, after: Listing, pairs: Mapping[str, str]) -> Iterator[Change]:
    """The changes, those of removed nodes behind the nodes that they followed."""
    old = {entry.name: entry for entry in before.entries}
    partner = {two: one for one, two in pairs.items()}
    removed: dict[str | None, list[Entry]] = {}
    last: str | None = None
    for entry in before.entries:
        if entry.name in pairs:
            last = entry.name
        else:
            removed.setdefault(last, []).append(entry)
    yield from (Change("removed", entry, None) for entry in removed.get(None, ()))
    for entry in after.entries:
        one = partner.get(entry.name)
        if one is None:
            yield Change("added", None, entry)
            continue
        fields = _fields(old[one], entry, pairs)
        fields |= _reads(old[one], before, after)
        if fields:
            kind: Kind = "rewired" if set(fields) == {"operands"} else "changed"
            yield Change(kind, old[one], entry, fields)
        yield from (Change("removed", gone, None) for gone in removed.get(one, ()))


def _fields(one: Entry, two: Entry, pairs: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    compared = {
        "op": (one.target, two.target),
        "arguments": (one.arguments, two.arguments),
        "type": (one.type, two.type),
        "phase": (one.phase, two.phase),
    }
    found = {name: texts for name, texts in compared.items() if texts[0] != texts[1]}
    if tuple(pairs.get(name) for name in one.operands) != two.operands:
        found["operands"] = (", ".join(one.operands), ", ".join(two.operands))
    return found


def _reads(entry: Entry, before: Listing, after: Listing) -> dict[str, tuple[str, str]]:
    """Parameters that a node reads and that have another type in the second graph."""
    both = [path for path in entry.state if path in before.state and path in after.state]
    types = [(f"{p} {before.state[p].type}", f"{p} {after.state[p].type}") for p in both]
    differing = [pair for pair in types if pair[0] != pair[1]]
    if not differing:
        return {}
    one, two = zip(*differing, strict=True)
    return {"state": (", ".join(one), ", ".join(two))}


def _state_changes(before: Listing, after: Listing) -> Iterator[StateChange]:
    for path in dict.fromkeys([*before.state, *after.state]):
        one, two = before.state.get(path), after.state.get(path)
        if one is None or two is None:
            kind = "added" if one is None else "removed"
            yield StateChange(path, kind, one.type if one else "", two.type if two else "")
        elif one.type != two.type:
            yield StateChange(path, "type", one.type, two.type)
        elif not _same_values(one.value, two.value):
            yield StateChange(path, "values", one.type, two.type)


def _same_values(one: torch.Tensor | None, two: torch.Tensor | None) -> bool:
    if one is None or two is None or one is two:
        return True
    if one.is_meta or two.is_meta or one.layout is not torch.strided:
        return True
    two = two.to(one.device)
    if one.is_floating_point() or one.is_complex():
        return bool(((one == two) | ((one != one) & (two != two))).all())
    return torch.equal(one, two)

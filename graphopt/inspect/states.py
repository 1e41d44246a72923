"""The states of a program along a pipeline, aligned: which node of one is which node of another.

Names alone don't do: tracing names the nodes of a joint graph by counting, so that one op more
renames all that follow.  A forward node is known by the node of the program that it was traced
from, a backward node by its module and op, each with how many of these came before.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.errors import UnsupportedError
from graphopt.inspect.document import Document, Mode, is_training
from graphopt.inspect.nodes import Collected, NodeView, collected
from graphopt.inspect.views import document

if TYPE_CHECKING:
    from graphopt.ir.program import PassRecord, Program

_AGAIN = re.compile(r"_again\d+$")
_COUNT = re.compile(r"_\d+$")
Key = tuple[Any, ...]


@dataclass
class State:
    """A program after a pass.

    Attributes:
        label: Text of the pass; ``capture`` for the first.
        record: What the pass reported; None for the first.
        shown: Its graph, as every state shows it.
        found: The nodes of that graph.
        recorded: False where the program of this state isn't known and an earlier one stands in.
        plan: The planned step that runs instead, if there is one.
        names: Node of `shown` -> its name in the union; filled by `align`.
        plan_names: The same for the nodes of the plan.
        again: Name in the union -> how often a planned step runs it; only of what runs repeatedly.
        holders: Placeholder of the program -> what the input is called here.
    """

    label: str
    record: PassRecord | None
    shown: Document
    found: Collected
    recorded: bool = True
    plan: tuple[Document, Collected] | None = None
    names: dict[str, str] = field(default_factory=dict)
    plan_names: dict[str, str] = field(default_factory=dict)
    again: dict[str, int] = field(default_factory=dict)
    holders: Mapping[str, str] = field(default_factory=dict)

    def own_names(self) -> dict[str, str]:
        """Names that reports give nodes of the joint graph -> names in the union.

        With a plan these are the names of the graph that it was made from.  What the plan dissolved
        is known by the joint graph's names, as long as these are the same.
        """

        def named(found: Collected, names: Mapping[str, str]) -> dict[str, str]:
            return {_base(view, found): names[view.name] for view in found.views}

        joint = named(self.found, self.names)
        if self.plan is None:
            return joint
        planned = named(self.plan[1], self.plan_names)
        same = all(joint[name] == union for name, union in planned.items() if name in joint)
        return {**joint, **planned} if same else planned

    @property
    def step(self) -> tuple[Document, Collected, Mapping[str, str]]:
        """What runs: the plan, else the graph; with the names of its nodes in the union."""
        if self.plan is not None:
            return *self.plan, self.plan_names
        return self.shown, self.found, self.names

    def nodes(self) -> Iterator[tuple[str, NodeView]]:
        """``(name in the union, node)`` of what is there; a node that runs again comes once."""
        _, found, names = self.step
        seen = set()
        for view in found.views:
            name = names[view.name]
            if name not in seen:
                seen.add(name)
                yield name, view


def states_of(
    programs: Sequence[tuple[PassRecord | None, Program | None]], training: Mode
) -> tuple[list[State], list[str]]:
    """The states of the programs of a run, and what could not be shown.

    Args:
        programs: What was captured, and what each pass gave, or None where that isn't known.
        training: Mode of the model, or of each module path.
    """
    notes: list[str] = []
    kinds = ("joint", "program") if is_training(training) else ("program",)
    for kind in kinds:
        try:
            return _states(programs, kind, training, notes), notes
        except UnsupportedError as error:
            if kind == kinds[-1]:
                raise
            notes.append(f"the backward pass isn't shown: {error.message}")
    raise AssertionError("there is a last kind")


def _states(
    programs: Sequence[tuple[PassRecord | None, Program | None]],
    kind: str,
    training: Mode,
    notes: list[str],
) -> list[State]:
    states: list[State] = []
    drawn: dict[int, tuple[Document, Collected]] = {}
    for record, program in programs:
        label = "capture" if record is None else record.spec or record.name
        if program is None:
            states.append(State(label, record, states[-1].shown, states[-1].found, recorded=False))
            continue
        key = id(program.module)
        if record is not None and not record.changed and states:
            drawn[key] = states[-1].shown, states[-1].found
        if key not in drawn:
            shown = document(program, kind, training=training)
            drawn[key] = shown, collected(shown)
        states.append(State(label, record, *drawn[key]))
        states[-1].plan = _plan(program, training, notes)
        states[-1].holders = _holders(program)
    return states


def _holders(program: Program) -> dict[str, str]:
    """Placeholder -> name of the input: FX numbers names that Python has already, as ``input``."""
    nodes = program.module.graph.find_nodes(op="placeholder")
    return {n.name: leaf.name for n, leaf in zip(nodes, program.signature.inputs, strict=False)}


def _plan(program: Program, training: Mode, notes: list[str]) -> tuple[Document, Collected] | None:
    if program.planner is None:
        return None
    try:
        shown = document(program, "plan", training=training)
    except UnsupportedError as error:
        if hasattr(program.planner, "predict_peak"):  # others only stand for one
            notes.append(f"the plan isn't shown: {error.message}")
        return None
    return shown, collected(shown)


def align(states: Sequence[State]) -> list[str]:
    """Give the nodes of all states names in their union.

    Returns:
        The names, in an order that agrees with that of each state as far as possible.
    """
    union = _Union()
    for state in states:
        if not state.names:
            state.names = union.add(_keys(state.found))
        if state.plan is not None:
            _, found = state.plan
            state.plan_names = union.add(_plan_keys(state, found))
            counts = Counter(state.plan_names.values())
            state.again = {name: count for name, count in counts.items() if count > 1}
    return union.ordered()


class _Union:
    def __init__(self) -> None:
        self.named: dict[Key, str] = {}
        self.taken: set[str] = set()
        self.behind: dict[str, list[str]] = {"": []}

    def add(self, keys: Mapping[str, Key]) -> dict[str, str]:
        names, last = {}, ""
        for own, key in keys.items():
            name = self.named.get(key)
            if name is None:
                name = self.named[key] = self._fresh(own)
                self.behind[name] = []
                self.behind[last].append(name)
            names[own] = last = name
        return names

    def _fresh(self, wish: str) -> str:
        unique, count = wish, 1
        while unique in self.taken:
            unique, count = f"{wish}'{count if count > 1 else ''}", count + 1
        self.taken.add(unique)
        return unique

    def ordered(self) -> list[str]:
        result: list[str] = []
        stack = [""]
        while stack:
            name = stack.pop()
            if name:
                result.append(name)
            # The last that was added stands closest behind its neighbour.
            stack += self.behind[name]
        return result


def origin_of(node: fx.Node) -> str | None:
    """The node of the program that a forward node of a joint graph was traced from."""
    sources = node.meta.get("from_node") or ()
    return str(sources[0].name) if sources else None


def _keys(found: Collected) -> dict[str, Key]:
    scopes = {view.name: view.scope for view in found.views}
    counts: Counter[Key] = Counter()
    keys: dict[str, Key] = {}
    for view in found.views:
        node = found.nodes.get(view.name)
        if node is None or not _is_traced(node, view):
            keys[view.name] = ("name", view.op, view.name)
            continue
        key = _place(node, node.name, view, scopes)
        keys[view.name] = (*key, counts[key])
        counts[key] += 1
    return keys


def _is_traced(node: fx.Node, view: NodeView) -> bool:
    return "partitioner_tag" in node.meta and "/" not in view.name


def _place(node: fx.Node, name: str, view: NodeView, scopes: Mapping[str, str]) -> Key:
    """Where a node comes from.

    Its op is that of its name, since plans run some under other targets.  Sums of gradients belong
    to no module: they are known by what is added last.
    """
    backward = view.phase == "backward"
    origin = None if backward else origin_of(node)
    added = (scopes[name] for name in reversed(view.inputs) if scopes[name])
    scope = origin or view.scope or next(added, "")
    return ("backward" if backward else "forward", scope, _COUNT.sub("", name))


def _plan_keys(state: State, found: Collected) -> dict[str, Key]:
    """Keys of a plan's nodes.

    A plan may run nodes in another order and more than once, and is made from a joint graph that
    may lack outputs which nobody uses: names count differently there, but in the same order.
    """
    known = set(_keys(state.found).values())
    bases = {view.name: _base(view, found) for view in found.views}
    scopes = {view.name: view.scope for view in found.views}
    places: dict[str, Key] = {}
    for view in found.views:
        node = found.nodes.get(view.name)
        if node is not None and _is_traced(node, view):
            places.setdefault(bases[view.name], _place(node, bases[view.name], view, scopes))
    counts: Counter[Key] = Counter()
    numbered: dict[str, Key] = {}
    for base in sorted(places, key=_count_of):
        numbered[base] = (*places[base], counts[places[base]])
        counts[places[base]] += 1
    keys: dict[str, Key] = {}
    for view in found.views:
        base = bases[view.name]
        key = numbered.get(base, ("name", view.op, view.name))
        written = ("name", "output", f"mutation {view.state[0]}") if view.state else key
        if base.endswith("_commit") and written in known:
            key = written  # what is an output there is a copy here
        keys[view.name] = key if key in known else ("plan", base)
    return keys


def _base(view: NodeView, found: Collected) -> str:
    node = found.nodes.get(view.name)
    return view.name if node is None else _AGAIN.sub("", node.name)


def _count_of(name: str) -> int:
    found = _COUNT.search(name)
    return int(found[0][1:]) if found else 0

"""The one document that every view of a result is made from, as JSON-able data.

`graphopt.inspect.schema` says what is in it, and reads it back.  Nodes are those of all states of
the program along the pipeline, under one name each; what a state has, and what differs in it, is in
its snapshot.  Values that are empty, zero or null are left out of nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.inspect.document import Document, Mode, Slot, class_name, is_training
from graphopt.inspect.facts import field_overlays, kept_overlay, memory_overlays, pass_overlays
from graphopt.inspect.figures import summary_form
from graphopt.inspect.live import live_bytes
from graphopt.inspect.nodes import NodeView, collected, dtype_name
from graphopt.inspect.schema import FORMAT, SCHEMA_VERSION
from graphopt.inspect.states import State, align, origin_of, states_of
from graphopt.inspect.timeline import Timeline, timeline
from graphopt.instruments import Instrument
from graphopt.ir.module import OptimizedModule

if TYPE_CHECKING:
    from graphopt.ir.program import Program
    from graphopt.pipeline import Pass, PassContext, PassResult

_ALWAYS = ("name", "op", "inputs", "state")
_LEFT_OUT = ("segment",)


class Recorder(Instrument):
    """Keeps the program after each pass, so that an inspection can show every one of them.

    Attributes:
        programs: The captured program, and what each pass gave.
    """

    def __init__(self) -> None:
        self.programs: list[Program] = []

    def start(self, program: Program, context: PassContext) -> None:
        """The run begins."""
        self.programs = [program]

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """A pass ran."""
        self.programs.append(result.program)


def inspection(
    before: Program,
    after: Program | OptimizedModule | None = None,
    *,
    recorded: Recorder | Sequence[Program] = (),
    training: Mode | None = None,
    budget: Mapping[str, str] | None = None,
    seconds: bool = True,
) -> dict[str, Any]:
    """Everything about a program, or about what a pipeline made of it.

    Args:
        before: The program as captured.
        after: What passes made of it; None: there is only the one.
        recorded: The program after each pass, or the recorder that watched the run; without it
            the passes in between are listed and their graphs are not shown.
        training: Mode of the model, or of each module path; default: that of the module that was
            given, else training.
        budget: What was asked for, as fields of text; default: what the module's report says.
        seconds: Whether to time each distinct op on this machine.

    Returns:
        The document (see `graphopt.inspect.schema`).

    Raises:
        UnsupportedError: The program can't be drawn.
    """
    if isinstance(after, OptimizedModule):
        budget = after.report.budget if budget is None else budget
        training = after.training if training is None else training
        after = after.program
    training = True if training is None else training
    programs = recorded.programs if isinstance(recorded, Recorder) else list(recorded)
    states, notes = states_of(_run(before, after, programs), training)
    return _Builder(states, notes, budget or {}, training, seconds).build()


def document_inspection(shown: Document, *, seconds: bool = False) -> dict[str, Any]:
    """The same of one graph that was prepared already: a program, a joint graph or a plan."""
    state = State(shown.view, None, shown, collected(shown))
    builder = _Builder([state], [], {}, True, seconds)
    builder.history = shown.history
    return builder.build()


def _run(
    before: Program, after: Program | None, programs: Sequence[Program]
) -> list[tuple[Any, Program | None]]:
    """Records with the programs that they gave; None for a program that nobody kept."""
    if after is None:
        return [(None, before)]
    records = after.history[len(before.history) :]
    known: list[Program | None] = [None] * len(records)
    if len(programs) == len(records) + 1:
        known = list(programs[1:])
    if records:
        known[-1] = after
        return [(None, before), *zip(records, known, strict=True)]
    return [(None, before), (None, after)]


class _Builder:
    def __init__(
        self,
        states: list[State],
        notes: list[str],
        budget: Mapping[str, str],
        training: Mode,
        seconds: bool,
    ) -> None:
        self.states, self.notes, self.budget = states, notes, budget
        self.training, self.seconds = is_training(training), seconds
        self.order = align(states)
        self.index = {name: position for position, name in enumerate(self.order)}
        self.sources: dict[str, int] = {}
        self.history = states[-1].shown.history
        self.lines: dict[int, tuple[int, Timeline]] = {}  # of each graph that runs

    def build(self) -> dict[str, Any]:
        first, last = self.states[0], self.states[-1]
        for state in self.states:
            self._timeline(state)
        nodes = self._nodes()
        reported, notes = pass_overlays(self.states)
        before, after = self._timeline(first), self._timeline(last)
        overlays = [
            *field_overlays(nodes),
            *memory_overlays(before, after if after is not before else None),
            *kept_overlay(self.states),
            *reported,
        ]
        summary = summary_form(self.states, self.budget, [*self.notes, *notes])
        unmeasured = [m for m in before.live.measured.values() if not m.measured]
        if unmeasured:
            summary["warnings"].append(
                f"{len(unmeasured)} ops could not be run on their own; their bytes are those of "
                f"the graph: {unmeasured[0].reason}"
            )
        limit = next((f["limit"] for f in summary["figures"] if f.get("limit")), None)
        return {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "title": first.shown.title,
            "view": last.step[0].view,
            "training": self.training,
            "passes": list(self.history),
            "inputs": _slots(first.shown.inputs),
            "tangents": _slots(first.shown.tangents),
            "state": _slots(first.shown.state.values()),
            "segments": [{"title": s.title, "phase": s.phase} for s in last.step[0].segments],
            "sources": list(self.sources),
            "modules": self._modules(),
            "nodes": nodes,
            "snapshots": self._snapshots(nodes),
            "overlays": overlays,
            "timelines": [line.to_dict(self.index, limit) for _, line in self.lines.values()],
            "summary": summary,
            "saved": None if first.shown.saved is None else first.shown.saved.to_dict(),
        }

    def _modules(self) -> dict[str, str]:
        """Class of each module that a node lies in."""
        found: dict[str, str] = {}
        for state in self.states:
            for node in state.found.names:
                for key in ("nn_module_stack", "fwd_nn_module_stack"):
                    for path, cls in (node.meta.get(key) or {}).values():
                        found.setdefault(str(path), class_name(cls))
        return found

    def _timeline(self, state: State) -> Timeline:
        shown, found, names = state.step
        key = id(shown)
        if key not in self.lines:
            live = live_bytes(shown, seconds=self.seconds, keep_outputs=shown.view == "program")
            named = {node: names[own] for node, own in found.names.items()}
            made = timeline(state.label, shown, live, named)
            self.lines[key] = len(self.lines), made
        return self.lines[key][1]

    def _nodes(self) -> list[dict[str, Any]]:
        """Each node as it is in the first state that has it."""
        made: dict[str, dict[str, Any]] = {}
        for state in self.states:
            for found, names in self._graphs(state):
                for view in found.views:
                    if names[view.name] not in made:
                        made[names[view.name]] = self._form(state, view, found, names)
        return [made[name] for name in self.order]

    @staticmethod
    def _graphs(state: State) -> list[tuple[Any, Mapping[str, str]]]:
        graphs: list[tuple[Any, Mapping[str, str]]] = [(state.found, state.names)]
        return graphs if state.plan is None else [*graphs, (state.plan[1], state.plan_names)]

    def _form(
        self, state: State, view: NodeView, found: Any, names: Mapping[str, str]
    ) -> dict[str, Any]:
        data = view.to_dict()
        data["name"] = names[view.name]
        data["inputs"] = list(dict.fromkeys(names[name] for name in view.inputs))
        data["saved_for"] = [names.get(name, name) for name in view.saved_for]
        data = {
            key: value
            for key, value in data.items()
            if key in _ALWAYS or (value not in (None, "", 0, [], {}) and key not in _LEFT_OUT)
        }
        if view.bytes is None:
            data["bytes"] = None
        if view.source is not None:
            data["source"] = self.sources.setdefault(view.source, len(self.sources))
        node = found.nodes.get(view.name)
        if node is not None:
            origin = origin_of(node)
            if origin and origin != data["name"] and view.phase == "forward":
                data["origin"] = origin
            taken = self._timeline(state).live.measured.get(node)
            if taken is not None and taken.seconds:
                data["seconds"] = float(f"{taken.seconds:.3g}")
        return data

    def _snapshots(self, nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        current: dict[str, Mapping[str, Any]] = {}
        full = {node["name"]: node for node in nodes}
        result = []
        for state in self.states:
            _, found, names = state.step
            now: dict[str, Mapping[str, Any]] = {
                name: self._form(state, view, found, names) for name, view in state.nodes()
            }
            snapshot: dict[str, Any] = {
                "label": state.label,
                "recorded": state.recorded,
                "timeline": self.lines[id(state.step[0])][0],
                "added": [self.index[name] for name in now if name not in current],
                "removed": [self.index[name] for name in current if name not in now],
                "changed": {},
                "again": {str(self.index[name]): count for name, count in state.again.items()},
            }
            for name, form in now.items():
                differing = _differing(current.get(name, full[name]), form)
                if differing:
                    snapshot["changed"][str(self.index[name])] = differing
            sizes = _resized(self.states[0].shown, state.shown)
            if sizes:
                snapshot["state"] = sizes
            current = now
            result.append(snapshot)
        return result


_COMPARED = (
    *("target", "inputs", "state", "literals", "shapes", "dtypes"),
    *("bytes", "flops", "scope"),
)
_EMPTY: Mapping[str, Any] = {"bytes": 0, "flops": 0}


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a node that differ, with their new values; order of inputs doesn't count."""
    found: dict[str, Any] = {}
    if old["op"] != new["op"]:  # the new value of a buffer is an output, or a copy that is run
        return found
    for key in _COMPARED:
        first, second = old.get(key, _EMPTY.get(key)), new.get(key, _EMPTY.get(key))
        if key == "target" and {first, second} == {"aten.view", "aten.reshape"}:
            continue  # how plans run views
        if key == "inputs" and set(first or ()) == set(second or ()):
            continue
        if first != second:
            found[key] = second
    if "shapes" in found or "dtypes" in found:  # by itself it may differ in symbols' names
        found["type"] = new.get("type", "")
    return found


def _resized(before: Document, after: Document) -> dict[str, list[int]]:
    """Parameters and buffers of other sizes than at first."""
    return {
        path: list(slot.shape)
        for path, slot in after.state.items()
        if path in before.state and before.state[path].shape != slot.shape
    }


def _slots(items: Iterable[Slot]) -> dict[str, Any]:
    return {
        slot.name: {
            "shape": list(slot.shape),
            "dtype": dtype_name(slot.dtype),
            "trainable": slot.trainable,
            "constant": slot.constant is not None,
        }
        for slot in items
    }

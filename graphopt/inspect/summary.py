"""The table of a model by module: nodes, parameters, FLOPs, activations, saved bytes, peak."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from graphopt.cost.operators import Progress
from graphopt.errors import UnsupportedError
from graphopt.inspect.document import (
    Document,
    Mode,
    is_training,
    scope_of,
)
from graphopt.inspect.live import LiveBytes, live_bytes
from graphopt.inspect.nodes import NodeView, node_views
from graphopt.inspect.schema import SCHEMA_VERSION
from graphopt.inspect.text import one_line
from graphopt.inspect.views import document
from graphopt.plain import human_bytes, human_count

if TYPE_CHECKING:
    from graphopt.ir.program import Program


@dataclass
class ScopeRow:
    """Figures of one module, its children included.

    Attributes:
        path: Path of the module; empty for the model itself.
        module: Its class.
        depth: How deep it lies; 0 for the model.
        nodes: Calls in its forward graph.
        parameters: Number of parameter elements; one that several modules share counts for the
            first of them.
        flops: FLOPs of its forward pass.
        activation_bytes: Bytes that its forward pass allocates for values, whether they stay or
            not.
        saved_bytes: Bytes that it makes and that are kept for backward.
        peak_bytes: Its part of the bytes that are live at the peak.
        peak_share: The same as a fraction of the peak.
    """

    path: str
    module: str = ""
    depth: int = 0
    nodes: int = 0
    parameters: int = 0
    flops: int = 0
    activation_bytes: int = 0
    saved_bytes: int = 0
    peak_bytes: int = 0
    peak_share: float = 0.0


@dataclass(frozen=True)
class Summary:
    """The table as data.

    Attributes:
        title: Class of the model.
        training: Which mode it shows.
        rows: One for each module, parents before children, in the order in which they run.
        saved: Bytes kept between forward and backward.
        peak: Most live bytes above parameters, gradients and inputs, as simulated node after node
            with measured op sizes in the captured order.  It is an estimate: eager's order differs,
            and measured steps were up to a sixth off.
        peak_of: ``forward and backward`` or ``forward``.
        peak_at: The node that runs at the peak, and its module.
        notes: What limits these figures.
    """

    title: str
    training: bool
    rows: tuple[ScopeRow, ...]
    saved: int
    peak: int
    peak_of: str
    peak_at: tuple[str, str]
    notes: tuple[str, ...] = ()
    schema_version: int = field(default=SCHEMA_VERSION, kw_only=True)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        data = asdict(self)
        data["rows"] = [asdict(row) for row in self.rows]
        data["peak_at"] = {"node": self.peak_at[0], "module": self.peak_at[1]}
        data["notes"] = list(self.notes)
        return data

    def table(self, depth: int | None = None) -> Table:
        """A rich table.

        Args:
            depth: Deepest modules that are shown; default: all.
        """
        mode = "training" if self.training else "eval"
        node, scope = self.peak_at
        where = f" at {node} in {scope or 'the model'}" if node else ""
        caption = f"peak of {self.peak_of}: {human_bytes(self.peak)}{where}"
        caption += f"; saved for backward: {human_bytes(self.saved)}"
        caption = "\n".join(one_line(line) for line in [caption, *self.notes])
        table = Table(
            title=Text(one_line(f"{self.title} ({mode})")),
            caption=Text(caption),
            caption_justify="left",
        )
        table.add_column("module", no_wrap=True)
        for name in ("nodes", "parameters", "FLOPs", "activations", "saved", "of peak"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            if depth is None or row.depth <= depth:
                table.add_row(*_cells(row))
        return table


def _cells(row: ScopeRow) -> list[Text]:
    name = row.path.rpartition(".")[2] or "(model)"
    label = f"{'  ' * row.depth}{name} {row.module}"
    texts = [label, str(row.nodes), human_count(row.parameters), human_count(row.flops)]
    texts += [human_bytes(row.activation_bytes), human_bytes(row.saved_bytes)]
    return [Text(one_line(text)) for text in [*texts, f"{100 * row.peak_share:.1f} %"]]


def summarize(
    program: Program, *, training: Mode = True, progress: Progress | None = None
) -> Summary:
    """Make the table of a program by module.

    Args:
        program: A captured program.
        training: Mode of the model, or of each module path.
        progress: Called with ``(ops measured, ops in all)``.

    Returns:
        The table; rich and JSON forms by its methods.
    """
    shown = document(program, "program", training=training)
    rows = _Rows()
    for node in node_views(shown):
        rows.add_node(node)
    _count_parameters(shown, rows)
    saved = _count_saved(shown, rows)
    live, peak_of, notes = _peak(program, shown, training, progress)
    for node, size in live.holders.items():
        rows.add(*scope_of(node), peak_bytes=size)
    ordered = rows.ordered(live.peak)
    at = (live.at.name, scope_of(live.at)[0]) if live.at is not None else ("", "")
    return Summary(
        shown.title, is_training(training), ordered, saved, live.peak, peak_of, at, notes
    )


class _Rows:
    """Rows by path; what is added to a module is added to all around it."""

    def __init__(self) -> None:
        self.rows: dict[str, ScopeRow] = {"": ScopeRow("")}

    def add_node(self, node: NodeView) -> None:
        if node.op == "call":
            size = node.bytes or 0
            self.add(node.scope, node.module, nodes=1, flops=node.flops, activation_bytes=size)

    def add(self, path: str, module: str, **figures: int) -> None:
        """Add figures to a module and to all around it."""
        for around in _chain(path):
            row = self.rows.setdefault(around, ScopeRow(around))
            for name, value in figures.items():
                setattr(row, name, getattr(row, name) + value)
        if module and not self.rows[path].module:
            self.rows[path].module = module

    def ordered(self, peak: int) -> tuple[ScopeRow, ...]:
        """Parents before children, siblings in the order of their first appearance."""
        children: dict[str, list[ScopeRow]] = {}
        for path, row in self.rows.items():
            row.depth = path.count(".") + 1 if path else 0
            row.peak_share = row.peak_bytes / peak if peak else 0.0
            if path:
                children.setdefault(path.rpartition(".")[0], []).append(row)
        result: list[ScopeRow] = []
        stack = [self.rows[""]]
        while stack:
            row = stack.pop()
            result.append(row)
            stack += reversed(children.get(row.path, []))
        return tuple(result)


def _chain(path: str) -> Iterable[str]:
    yield ""
    parts = path.split(".") if path else []
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _count_parameters(shown: Document, rows: _Rows) -> None:
    seen: set[int] = set()
    for segment in shown.segments:
        for path, parameter in segment.module.named_parameters(remove_duplicate=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                rows.add(path.rpartition(".")[0], "", parameters=parameter.numel())


def _count_saved(shown: Document, rows: _Rows) -> int:
    if shown.saved is None:
        return 0
    scopes = {node.name: node.scope for node in node_views(shown)}
    for value in shown.saved.values:
        maker = value.name.removesuffix(".saved") if value.kind == "internal" else value.name
        scope = scopes.get(maker, scopes.get(value.savers[0] if value.savers else "", ""))
        if value.extra:
            rows.add(scope, "", saved_bytes=value.extra)
    return shown.saved.total


def _peak(
    program: Program, shown: Document, training: Mode, progress: Progress | None
) -> tuple[LiveBytes, str, tuple[str, ...]]:
    notes: tuple[str, ...] = ()
    if is_training(training) and shown.saved is not None:
        try:
            joint = document(program, "joint", training=training)
            return live_bytes(joint, progress), "forward and backward", notes
        except UnsupportedError as error:
            notes = (f"the peak leaves backward out: {one_line(error.message)}",)
    return live_bytes(shown, progress, keep_outputs=True), "forward", notes

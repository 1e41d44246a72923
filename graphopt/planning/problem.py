"""The task graph of a training step (or of a forward pass), made from its joint graph."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from graphopt.cost import OpMeasurement
from graphopt.cost.sizes import concrete
from graphopt.ir.joint import JointInput, JointView
from graphopt.ir.ops import is_data_dependent, is_effectful, is_random, is_repeatable
from graphopt.ir.storage import Role, StorageMap, is_tuple
from graphopt.planning.clusters import Cluster, find_clusters
from graphopt.planning.prepare import depends_on_tangents, reads_replaced_operand
from graphopt.runtime.lower import Step
from graphopt.solvers import Task, TaskGraph, Value


@dataclass(frozen=True)
class TurnCosts:
    """What happens between forward and backward: the loss, outside of the graph.

    Attributes:
        tangent_bytes: Output position -> bytes of its gradient.
        workspace: Bytes beyond the outputs while the loss is computed.
        state: Bytes beyond held outputs and tangents while it is differentiated.
        held: Positions of the outputs that are alive then.
        hold_outputs: Whether the caller keeps all outputs during backward.
    """

    tangent_bytes: Mapping[int, int]
    workspace: int = 0
    state: int = 0
    held: frozenset[int] = frozenset()
    hold_outputs: bool = False


@dataclass(frozen=True)
class Problem:
    """A task graph and what its tasks mean.

    Attributes:
        graph: Tasks in the joint graph's order.
        steps: Task index -> what it does.
        value_of: Storage owner -> value id.
    """

    graph: TaskGraph
    steps: tuple[Step, ...]
    value_of: dict[fx.Node, int]

    @property
    def turn(self) -> int:
        """The task with which backward begins; the number of tasks if there is no backward."""
        kinds = [step.kind for step in self.steps]
        return kinds.index("turn") if "turn" in kinds else len(kinds)


def build_problem(
    view: JointView,
    storage: StorageMap,
    measured: Mapping[fx.Node, OpMeasurement],
    duration: Callable[[fx.Node], int],
    committed: Mapping[JointInput, fx.Node],
    turn: TurnCosts | None,
    *,
    small_gradient: int = 0,
    examples: Mapping[fx.Node, OpMeasurement] | None = None,
    stepping: bool = False,
) -> Problem:
    """States a joint graph as a task graph.

    Args:
        view: The prepared joint view.
        storage: Roles and owners of its nodes.
        measured: What each computation allocates.
        duration: Cost of a computation, in any unit.
        committed: Mutated operand -> node of its new value.
        turn: The loss; None for a forward pass alone.
        small_gradient: Gradients wait until they have as many bytes together, which saves stages.
        examples: What each computation allocates at the example sizes, if `measured` is for
            others: these decide what is one task, so that plans fit every size.
        stepping: Whether operands may be written to as soon as they get their gradient.
    """
    builder = _Builder(view, storage, measured, duration, committed, turn, small_gradient, stepping)
    return builder.build(measured if examples is None else examples)


@dataclass
class _Builder:
    view: JointView
    storage: StorageMap
    measured: Mapping[fx.Node, OpMeasurement]
    duration: Callable[[fx.Node], int]
    committed: Mapping[JointInput, fx.Node]
    turn: TurnCosts | None
    small_gradient: int
    stepping: bool
    tasks: list[Task] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    value_of: dict[fx.Node, int] = field(default_factory=dict)
    task_of: dict[fx.Node, int] = field(default_factory=dict)
    after: list[tuple[int, int]] = field(default_factory=list)
    readers: dict[fx.Node, list[int]] = field(default_factory=lambda: defaultdict(list))
    turn_index: int = -1
    effects: list[int] = field(default_factory=list)
    waiting: list[tuple[JointInput, fx.Node]] = field(default_factory=list)

    def build(self, examples: Mapping[fx.Node, OpMeasurement]) -> Problem:
        """The problem."""
        self.hold_outputs = self.turn is None or self.turn.hold_outputs
        self.mutated = {operand.node for operand in self.committed}
        self.kept = self._kept()
        late = depends_on_tangents(self.view)
        clusters = find_clusters(self.view, self.storage, examples, late)
        first_late = next((i for i, c in enumerate(clusters) if c.last in late), len(clusters))
        for cluster in clusters[:first_late]:
            self._add_cluster(cluster)
        self._add_commits()
        if self.turn is not None:
            self._add_turn()
            gradients = self._final_gradients(clusters[first_late:])
            self._hand_over(gradients.get(-1, ()))
            for place, cluster in enumerate(clusters[first_late:]):
                self._add_cluster(cluster)
                self._hand_over(gradients.get(place, ()))
            self._hand_over((), flush=True)
        graph = TaskGraph(tuple(self.tasks), tuple(self.values), tuple(dict.fromkeys(self.after)))
        return Problem(graph, tuple(self.steps), self.value_of)

    def _is_task(self, node: fx.Node) -> bool:
        return self.storage.role[node] is Role.COMPUTE

    def _kept(self) -> set[fx.Node]:
        return {self.storage.base[o.node] for o in self.view.outputs_of("output") if o.node}

    # -- computations ------------------------------------------------------------------------

    def _add_cluster(self, cluster: Cluster) -> None:
        index = len(self.tasks)
        for node in cluster.nodes:
            self.task_of[node] = index
            for argument in node.all_input_nodes:
                self.readers[self.storage.base[argument]].append(index)
        inputs = tuple(dict.fromkeys(v for n in cluster.nodes for v in self._inputs(n)))
        outputs, unread = self._outputs(cluster.last, index)
        made = sum(self.values[v].bytes for v in outputs)
        self._add_task(
            Step("run", nodes=tuple(cluster.nodes), reuse=cluster.reuse),
            Task(
                duration=sum(self.duration(n) for n in cluster.nodes),
                inputs=inputs,
                outputs=tuple(outputs),
                workspace=max(0, self._peak(cluster, unread) - made),
                recomputable=all(self._is_repeatable(n) for n in cluster.nodes),
                name=cluster.last.name,
            ),
        )
        for node in cluster.nodes:
            self._order_sizes(node, index)
            self._order_effects(node, index)

    def _is_repeatable(self, node: fx.Node) -> bool:
        return is_repeatable(node) and not reads_replaced_operand(
            node, self.mutated, self.storage.base
        )

    def _peak(self, cluster: Cluster, unread: int) -> int:
        """Most bytes beyond the inputs while the chain runs in its one buffer."""
        live = peak = 0
        for node in cluster.nodes:
            found = self.measured[node]
            live = live if node in cluster.reuse else live + sum(found.output_bytes)
            peak = max(peak, live + found.workspace)
        return max(peak, live + unread)

    def _outputs(self, node: fx.Node, index: int) -> tuple[list[int], int]:
        """Value ids of the results that somebody names, and the bytes of those nobody does."""
        found = self.measured[node]
        if not is_tuple(node):
            return [self._add_value(node, sum(found.output_bytes), index)], 0
        projections = [u for u in node.users if self.storage.role[u] is Role.PROJECTION]
        named: dict[int, fx.Node] = {u.args[1]: u for u in projections}  # type: ignore[misc]
        sizes = dict(enumerate(found.output_bytes))
        outputs = [self._add_value(user, sizes.pop(i, 0), index) for i, user in named.items()]
        return outputs, sum(sizes.values())

    def _add_value(self, node: fx.Node, size: int, producer: int) -> int:
        self.value_of[node] = len(self.values)
        self.values.append(Value(size, producer, keep=self.hold_outputs and node in self.kept))
        return self.value_of[node]

    def _inputs(self, node: fx.Node) -> tuple[int, ...]:
        owners = self.storage.operands(node)
        return tuple(self.value_of[owner] for owner in owners if owner in self.value_of)

    def _add_task(self, step: Step, task: Task) -> int:
        self.steps.append(step)
        self.tasks.append(task)
        return len(self.tasks) - 1

    def _order_sizes(self, node: fx.Node, index: int) -> None:
        """A size is read when its tensor is first made: whoever needs the size comes later."""
        pending = [a for a in node.all_input_nodes if self.storage.role[a] is not Role.COMPUTE]
        seen = set(pending)
        while pending:
            argument = pending.pop()
            owner = self.storage.base[argument]
            source = self._source(owner)
            if self.task_of.get(source, index) != index:
                self.after.append((self.task_of[source], index))
            fresh = [
                a
                for a in argument.all_input_nodes
                if a not in seen and self.storage.role[argument] in (Role.SYMBOL, Role.VIEW)
            ]
            seen.update(fresh)
            pending.extend(fresh)

    def _source(self, owner: fx.Node) -> fx.Node:
        """The computation that makes a storage."""
        return owner.all_input_nodes[0] if self.storage.role[owner] is Role.PROJECTION else owner

    def _order_effects(self, node: fx.Node, index: int) -> None:
        """Random draws and effects keep their order among themselves."""
        if is_random(node) or is_effectful(node) or is_data_dependent(node):
            if self.effects and self.effects[-1] != index:
                self.after.append((self.effects[-1], index))
            self.effects.append(index)

    # -- the end of forward --------------------------------------------------------------------

    def _add_commits(self) -> None:
        for operand, node in self.committed.items():
            owner = self.storage.base[node]
            inputs = (self.value_of[owner],) if owner in self.value_of else ()
            index = self._add_task(
                Step("commit", node=node, of=operand),
                Task(0, inputs, recomputable=False, name=f"commit {operand.name}"),
            )
            self.after += [(task, index) for task in self.readers[operand.node]]
            self.effects.append(index)

    def _add_turn(self) -> None:
        assert self.turn is not None
        state = self._add_loss()
        index = self.turn_index = len(self.tasks)
        tangents = [
            self._add_value(i.node, self.turn.tangent_bytes.get(int(i.name), 0), index)
            for i in self.view.inputs_of("tangent")
        ]
        self._add_task(
            Step("turn"),
            Task(
                0,
                (state, *self._output_values(self.turn.held)),
                tuple(tangents),
                recomputable=False,
                name="backward of the loss",
            ),
        )

    def _add_loss(self) -> int:
        """The computation of the loss; returns the value that stands for what it leaves."""
        assert self.turn is not None
        index, state = len(self.tasks), len(self.values)
        self.values.append(Value(self.turn.state, index))
        self._add_task(
            Step("loss"),
            Task(
                0,
                self._output_values(None),
                (state,),
                max(0, self.turn.workspace - self.turn.state),
                recomputable=False,
                name="loss",
            ),
        )
        self.after += [(effect, index) for effect in self.effects]
        return state

    def _output_values(self, positions: Collection[int] | None) -> tuple[int, ...]:
        """The values that are returned at these positions; None: at all."""
        owners = [
            self.storage.base[o.node]
            for o in self.view.outputs_of("output")
            if o.node is not None and (positions is None or o.of in positions)
        ]
        return tuple(dict.fromkeys(self.value_of[n] for n in owners if n in self.value_of))

    # -- gradients -----------------------------------------------------------------------------

    def _final_gradients(
        self, clusters: Sequence[Cluster]
    ) -> dict[int, list[tuple[JointInput, fx.Node]]]:
        """Place of a cluster of the backward pass -> the gradients that are final after it.

        Where an optimizer may step as soon as it gets one, also nobody may read its operand any
        more.
        """
        made = {node: place for place, c in enumerate(clusters) for node in c.nodes}
        read: dict[fx.Node, int] = {}
        for node, place in made.items() if self.stepping else ():
            for argument in node.all_input_nodes:
                owner = self.storage.base[argument]
                read[owner] = max(place, read.get(owner, -1))
        final: dict[int, list[tuple[JointInput, fx.Node]]] = {}
        for output in self.view.outputs_of("gradient"):
            if output.node is None or not isinstance(output.of, JointInput):
                continue
            source = self._source(self.storage.base[output.node])
            place = max(made.get(source, -1), read.get(output.of.node, -1))
            final.setdefault(place, []).append((output.of, output.node))
        return final

    def _hand_over(
        self, gradients: Sequence[tuple[JointInput, fx.Node]], *, flush: bool = False
    ) -> None:
        self.waiting += gradients
        bytes_waiting = sum(_example_bytes(node) for _, node in self.waiting)
        if not (flush or bytes_waiting > self.small_gradient):
            return
        for operand, node in self.waiting:
            owner = self.storage.base[node]
            inputs = (self.value_of[owner],) if owner in self.value_of else ()
            index = self._add_task(
                Step("hand_over", node=node, of=operand),
                Task(0, inputs, recomputable=False, name=f"gradient of {operand.name}"),
            )
            self.after.append((self.turn_index, index))
            readers = self.readers[operand.node] if self.stepping else ()
            late = [task for task in readers if task > self.turn_index]
            self.after += [(task, index) for task in late]
        self.waiting = []


def _example_bytes(node: fx.Node) -> int:
    value = node.meta["val"]
    return concrete(value.numel()) * value.element_size()


def live_at_peak(graph: TaskGraph, sequence: Sequence[int]) -> tuple[set[int], int]:
    """Values that are live when a sequence needs most bytes, and the workspace of the task then."""
    last_use: dict[tuple[int, int], int] = {}
    born: dict[int, int] = {}
    for step, task in enumerate(sequence):
        for value in graph.tasks[task].inputs:
            last_use[value, born[value]] = step
        for value in graph.tasks[task].outputs:
            born[value] = step
            last_use[value, step] = step
    for value, step in born.items():
        if graph.values[value].keep:
            last_use[value, step] = len(sequence)
    ends: dict[int, list[int]] = {}
    for (value, _), end in last_use.items():
        ends.setdefault(end, []).append(value)
    live: set[int] = set()
    most, found, workspace = -1, set(), 0
    for step, task in enumerate(sequence):
        live.update(graph.tasks[task].outputs)
        size = sum(graph.values[v].bytes for v in live) + graph.tasks[task].workspace
        if size > most:
            most, found = size, set(live)
            workspace = graph.tasks[task].workspace
        live.difference_update(ends.get(step, ()))
    return found, workspace

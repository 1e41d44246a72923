"""The saved-for-backward table: which values a forward pass keeps for its backward, and for whom.

The captured graph is run once, node by node, on fake tensors (or on given real ones) with autograd
recording, and `torch.autograd.graph.saved_tensors_hooks` tells what each op saves.  So the table
follows autograd's own rules: it depends on which parameters and inputs require a gradient, a tensor
that several ops save is counted once, and what hangs on a result that nobody uses isn't counted.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

from graphopt.cost.calls import TensorSpec
from graphopt.cost.sizes import Substitution, concrete, tensors_in
from graphopt.errors import RunError, UnsupportedError, first_line
from graphopt.ir.graphs import lookup
from graphopt.ir.interpret import Value, call, interpret, placed
from graphopt.ir.randomness import kept_random_state
from graphopt.ir.regions import region

if TYPE_CHECKING:
    from graphopt.ir.program import Program

Kind = Literal["activation", "internal", "parameter", "buffer", "input", "constant"]
_FREE = ("parameter", "buffer", "input", "constant")
# Ops that save buffers whose size only their real kernels know (oneDNN's and cuDNN's workspaces).
_OPAQUE = {torch.ops.aten.lstm.input, torch.ops.aten.lstm.data, torch.ops.aten.gru.input}
_OPAQUE |= {torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input}


@dataclass(frozen=True)
class SavedValue:
    """One storage that is alive between forward and backward because autograd saved it.

    Attributes:
        name: The node whose value it is.  For an ``internal`` one, which no node gives (the mask
            inside a dropout, a statistic, a cast weight), the node that made it, with ``.saved``.
        kind: ``activation``, ``internal``, or what exists anyway: ``parameter``, ``buffer``,
            ``input``, ``constant``.
        bytes: Bytes of the storage.
        savers: The nodes that save it, in order.
        shares: Other nodes whose values lie in the same storage: views, in-place results.
        shapes: Shape of the tensor as each saver saved it.
    """

    name: str
    kind: Kind
    bytes: int
    savers: tuple[str, ...]
    shares: tuple[str, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def extra(self) -> int:
        """Bytes above parameters, buffers and inputs: 0 for what exists anyway."""
        return 0 if self.kind in _FREE else self.bytes


@dataclass(frozen=True)
class SavedTable:
    """All values saved for backward.

    Attributes:
        values: One entry for each storage, in the order in which they were first saved.
        aliases: Node name -> name of the value in whose storage it lies, for all nodes.
    """

    values: tuple[SavedValue, ...]
    aliases: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        """Bytes above parameters, buffers and inputs."""
        return sum(value.extra for value in self.values)

    def of(self, node: fx.Node | str) -> SavedValue | None:
        """The saved storage that holds a node's value, or None if nothing saves it."""
        name = node if isinstance(node, str) else node.name
        owner = self.aliases.get(name, name)
        return next((value for value in self.values if value.name == owner), None)

    def saved_by(self, node: fx.Node | str) -> tuple[SavedValue, ...]:
        """What a node saves (values that others save as well included)."""
        name = node if isinstance(node, str) else node.name
        return tuple(value for value in self.values if name in value.savers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "total": self.total,
            "values": [
                {
                    "name": value.name,
                    "kind": value.kind,
                    "bytes": value.bytes,
                    "savers": list(value.savers),
                    "shares": list(value.shares),
                }
                for value in self.values
            ],
        }


def saved_table(
    program: Program,
    *,
    training: bool | Mapping[str, bool] = True,
    symbols: Substitution | None = None,
    inputs: Sequence[Any] | None = None,
) -> SavedTable:
    """The saved-for-backward table of a captured program.

    Args:
        program: The program; its parameters' ``requires_grad`` counts.
        training: Mode of the model, or of each module path.
        symbols: What stands for free sizes; default: the example sizes.
        inputs: Real flat inputs to run with instead of fake ones; needed only where sizes depend
            on the data.

    Raises:
        UnsupportedError: The graph can't run on fake tensors (sizes depend on the data).
    """
    module = program.specialize(training)
    if inputs is not None:
        return saved_by_graph(module, inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    leaves = program.signature.inputs
    fakes = [
        _stand_in(value, mode, symbols, leaf.requires_grad)
        for value, leaf in zip(program.fake_inputs(), leaves, strict=True)
    ]
    return saved_by_graph(module, fakes)


def saved_by_graph(module: fx.GraphModule, inputs: Sequence[Any]) -> SavedTable:
    """The saved-for-backward table of a flat graph module run on given inputs.

    Args:
        module: A flat graph, its modes fixed.  Its parameters and buffers are not changed.
        inputs: One real or concrete fake tensor for each placeholder.
    """
    mode = next((t.fake_mode for t in tensors_in(list(inputs)) if isinstance(t, FakeTensor)), None)
    run = _Run(mode)
    try:
        with kept_random_state(), torch.enable_grad(), run.hooks():
            if mode is None:
                outputs = run.graph(module, inputs)
            else:
                with mode:
                    outputs = run.graph(module, inputs)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, RunError) else error
        if isinstance(cause, torch._subclasses.fake_tensor.DynamicOutputShapeException):
            raise _data_dependent(run.current) from error
        raise UnsupportedError(
            f"the graph can't be run on fake tensors: {first_line(cause)}",
            node=run.current,
            hint="give real inputs",
        ) from error
    table = run.table()
    del outputs  # alive until here: what they hang on is what backward will need
    return table


def _data_dependent(node: Any) -> UnsupportedError:
    return UnsupportedError(
        "the sizes inside the model depend on the data", node=node, hint="give real inputs"
    )


def _stand_in(
    value: Any, mode: FakeTensorMode, symbols: Substitution | None, requires_grad: bool
) -> Any:
    if not isinstance(value, torch.Tensor):
        return concrete(value, symbols) if value is not None else None
    shape = [concrete(size, symbols) for size in value.shape]
    stride = [concrete(size, symbols) for size in value.stride()]
    with mode:
        fake = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return fake.requires_grad_() if requires_grad else fake


@dataclass(eq=False)
class _Packed:
    """What autograd holds instead of a saved tensor; it lives as long as the graph needs it."""

    storage: int
    shape: tuple[int, ...]
    saver: str
    __weakref__: Any = field(init=False, repr=False)


@dataclass
class _Owner:
    """A storage: who made it and who shares it."""

    name: str
    kind: Kind
    bytes: int
    shares: list[str] = field(default_factory=list)


class _Run:
    """One run of a graph with its sub-graphs, noting storages and what is saved."""

    def __init__(self, mode: FakeTensorMode | None) -> None:
        self.mode = mode
        self.current: fx.Node | None = None
        self.path: list[str] = []
        self.owners: dict[int, _Owner] = {}
        self.aliases: dict[str, str] = {}
        self.packed: list[weakref.ref[_Packed]] = []
        # Storages are held so that the address of a freed one can't come back as another's.
        self.storages: list[Any] = []
        self.attributes: dict[int, Any] = {}

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> _Packed:
        saver = self.path[0] if self.path else ""
        identity = self._note(tensor, f"{saver}.saved", "internal", share=False)
        packed = _Packed(identity, tuple(tensor.shape), saver)
        self.packed.append(weakref.ref(packed))
        return packed

    def _unpack(self, packed: _Packed) -> torch.Tensor:
        raise UnsupportedError("the model computes gradients inside its forward pass")

    def _note(self, tensor: torch.Tensor, name: str, kind: Kind, *, share: bool = True) -> int:
        storage = tensor.untyped_storage()
        identity = storage._cdata
        owner = self.owners.get(identity)
        if owner is None:
            self.owners[identity] = _Owner(name, kind, int(storage.nbytes()))
            self.storages.append(storage)
        elif share and owner.kind == "internal" and owner.name.endswith(".saved"):
            owner.name, owner.kind = name, kind  # saved inside the op that then returns it
        elif share and name != owner.name and name not in owner.shares:
            owner.shares.append(name)
        return identity

    def graph(self, module: fx.GraphModule, inputs: Iterable[Any]) -> Any:
        given = placed(module.graph, inputs)
        for node, value in given.items():
            self._note_value(node, value, "input")
        attribute = partial(self._attribute, module)
        return interpret(module.graph, given.values(), attribute, self._call, copied=False)

    def _note_value(self, node: fx.Node, value: Any, kind: Kind) -> None:
        name = "/".join(self.path) if self.path else node.name
        parts = value if isinstance(value, (list, tuple)) else [value]
        source = str(node.args[0]) if node.target is operator.getitem else ""
        for index, tensor in enumerate(parts):
            if not isinstance(tensor, torch.Tensor):
                continue
            own = f"{name}[{index}]" if isinstance(value, (list, tuple)) else name
            identity = self._note(tensor, own, kind)
            owner = self.owners[identity]
            if source and owner.name.startswith(f"{source}["):
                owner.name = own  # known by its getitem, as in the graph
            self.aliases[own] = owner.name

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        self.current = node
        value = lookup(module, str(node.target))
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in self.attributes:
            self.attributes[id(value)] = (self._twin(value), value)  # held: its id stays its own
        fake = self.attributes[id(value)][0]
        kind: Kind = "parameter" if isinstance(value, torch.nn.Parameter) else "buffer"
        self._note(fake, str(node.target), kind)
        self.aliases[node.name] = self.owners[fake.untyped_storage()._cdata].name
        return fake

    def _twin(self, value: torch.Tensor) -> torch.Tensor:
        if self.mode is not None:
            return self.mode.from_tensor(value)
        return value if isinstance(value, torch.nn.Parameter) else value.clone()  # may be updated

    def _call(self, node: fx.Node, value: Value) -> Any:
        self.current = node
        self.path.append(node.name)
        start = len(self.packed)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            result = self._higher_order(node, value)
        else:
            result = call(node, value)
        if self.mode is not None and node.target in _OPAQUE:
            self._real_sizes(node.target, *fx.map_arg((node.args, node.kwargs), value), start)
        self._note_value(node, result, "activation")
        self.path.pop()
        return result

    def _real_sizes(self, target: Any, args: Any, kwargs: Any, start: int) -> None:
        """Take the sizes of an op's internal tensors from a real run on synthesized inputs."""
        real = _internal_bytes(target, args, kwargs)
        mine = [entry.storage for ref in self.packed[start:] if (entry := ref()) is not None]
        mine = [s for s in dict.fromkeys(mine) if self.owners[s].kind == "internal"]
        if len(real) == len(mine):
            for storage, size in zip(mine, real, strict=True):
                self.owners[storage].bytes = size

    def _higher_order(self, node: fx.Node, value: Value) -> Any:
        target: Any = node.target
        args = fx.map_arg(node.args, value)
        inner = region(target, args)
        if inner is not None:
            mode, module, inputs = inner
            with mode():
                return self.graph(module, inputs)
        return self._branches(*args) if target.name() == "cond" else call(node, value)

    def _branches(self, predicate: Any, first: Any, second: Any, operands: Any = ()) -> Any:
        """Run both branches; the one that saves more counts, as either may be taken."""
        if self.mode is None:
            return self.graph(first if predicate else second, operands)
        start = len(self.packed)
        results = self.graph(first, operands)
        middle = len(self.packed)
        others = self.graph(second, operands)
        if self._extra(self.packed[start:middle]) >= self._extra(self.packed[middle:]):
            del self.packed[middle:]
            return results
        del self.packed[start:middle]
        return others

    def _extra(self, packed: Iterable[weakref.ref[_Packed]]) -> int:
        alive = {entry.storage for ref in packed if (entry := ref()) is not None}
        return sum(self.owners[s].bytes for s in alive if self.owners[s].kind not in _FREE)

    def table(self) -> SavedTable:
        entries: dict[int, list[_Packed]] = {}
        for reference in self.packed:
            entry = reference()
            if entry is not None:
                entries.setdefault(entry.storage, []).append(entry)
        names = _Unique()
        values = tuple(
            SavedValue(
                name=names(self.owners[storage].name),
                kind=self.owners[storage].kind,
                bytes=self.owners[storage].bytes,
                savers=tuple(dict.fromkeys(entry.saver for entry in saved)),
                shares=tuple(self.owners[storage].shares),
                shapes=tuple(entry.shape for entry in saved),
            )
            for storage, saved in entries.items()
        )
        return SavedTable(values, dict(self.aliases))


def _internal_bytes(target: Any, args: Any, kwargs: Any) -> list[int]:
    """Bytes of what a call saves besides its arguments, in order, on real synthesized arguments."""
    built: dict[int, torch.Tensor] = {}

    def build(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in built:
                spec = TensorSpec(
                    0, tuple(value.shape), tuple(value.stride()), value.dtype, value.device
                )
                built[id(value)] = spec.build().requires_grad_(value.requires_grad)
            return built[id(value)]
        if isinstance(value, (list, tuple)):
            return [build(item) for item in value]
        return value

    saved: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        saved.setdefault(storage._cdata, storage)

    with (
        unset_fake_temporarily(),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed),
    ):
        real_args = build(args)
        result = target(*real_args, **{name: build(value) for name, value in kwargs.items()})
    own = {t.untyped_storage()._cdata for t in built.values()}
    del result
    return [storage.nbytes() for identity, storage in saved.items() if identity not in own]


class _Unique:
    """Names that occur once: an op may save several internal tensors."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def __call__(self, name: str) -> str:
        count = self.seen[name] = self.seen.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"

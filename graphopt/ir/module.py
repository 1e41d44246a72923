"""`OptimizedModule`: a program as an ordinary ``nn.Module`` that drops in for its source."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.derived import derived
from graphopt.errors import MissingMethodError
from graphopt.ir.code import Code
from graphopt.ir.codegen import generate
from graphopt.ir.document import TensorTable, decode_program, encode_program
from graphopt.ir.graphs import bind_graph, copy_graph, lookup
from graphopt.ir.literals import check_move
from graphopt.ir.masks import masked_state
from graphopt.ir.metadata import is_stale, refreshed
from graphopt.ir.mode import runs_eval
from graphopt.ir.program import Program
from graphopt.ir.signature import Signature
from graphopt.ir.skeleton import (
    ADDED,
    INNER_HOOKS,
    Container,
    SequenceContainer,
    Skeleton,
    all_tensors,
    copy_tree,
)

_OPAQUE = "a planned graphopt module runs as it is planned, and is not traced into"


@dataclass(frozen=True)
class _Graph:
    """One of a module's graphs as code."""

    signature: Signature
    code: Code
    run: Callable[..., tuple[Any, ...]]


def _compiled(module: fx.GraphModule, signature: Signature) -> _Graph:
    code = generate(module)
    return _Graph(signature, code, code.compile())


class OptimizedModule(Container):
    """A captured and transformed model.

    It has the source's call signature, outputs, ``state_dict`` keys and module paths.  Its code is
    ``.code``, what was done to it is ``.report``, its graph is ``.program``.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run the program; takes and returns what the source model does."""
        graph = self._graphs[0]
        if len(self._graphs) > 1 and runs_eval(self._program.branches, self._is_training):
            graph = self._graphs[1]
        signature = graph.signature
        flat = signature.flatten_inputs(args, kwargs)
        if torch.compiler.is_compiling():
            return signature.unflatten_outputs(self._traced(graph, flat))
        signature.check(flat)
        if self._planner is not None and not _being_traced(flat):
            runner = self._planner.runner(self, flat)
            if runner is not None:
                return signature.unflatten_outputs(runner(flat))
        return signature.unflatten_outputs(graph.run(self, *flat))

    def _traced(self, graph: _Graph, flat: list[torch.Tensor]) -> Sequence[Any]:
        if self._planner is None or torch.compiler.is_exporting():
            return graph.run(self, *flat)
        return self._opaque(graph, flat)

    @torch.compiler.disable(reason=_OPAQUE)
    def _opaque(self, graph: _Graph, flat: list[torch.Tensor]) -> Sequence[Any]:
        graph.signature.check(flat)
        runner = self._planner.runner(self, flat)
        return graph.run(self, *flat) if runner is None else runner(flat)

    def _is_training(self, path: str) -> bool:
        module: Any = self
        for part in path.split(".") if path else ():
            module = module._modules[part]
        return module.training

    def train(self, mode: bool = True) -> OptimizedModule:
        """Set the mode of all modules, as the source's own ``train`` would."""
        super().train(mode)
        for path, training in self._program.skeleton.flags.get(mode, {}).items():
            self.get_submodule(path).training = training
        return self

    def _was_captured(self, name: str) -> bool:
        program = self.__dict__.get("_program")
        return program is not None and name in program.skeleton.attributes

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        check_move(self._program.literals, [*self.parameters(), *self.buffers()], fn)
        return super()._apply(fn, recurse)

    @property
    def program(self) -> Program:
        """The program, with its plans and rules; shares this module's parameters and buffers.

        After ``.half()`` or ``.to()`` it is one with the literals and metadata of these.
        """
        if is_stale(self._program):
            self.__dict__["_program"] = refreshed(self._program)
        return self._program

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load a state of this module, or one of the source model.

        Of the latter it takes its slices, and what its masks keep; tensors that linearization has
        added keep their values.
        """
        slices, masks = self._program.slices, self._program.masks
        state = state_dict if slices is None else slices.narrow(state_dict)
        state = state if masks is None else masked_state(masks, state)
        added = self._modules.get(ADDED)
        own = {} if added is None else added.state_dict(prefix=f"{ADDED}.")
        if own and not own.keys() & state.keys():
            warnings.warn(
                "this state knows nothing of the replaced non-linearities: they keep what was "
                "fitted to the weights before; linearize again for a fit to these",
                stacklevel=2,
            )
            state = {**state, **own}
        return super().load_state_dict(state, strict=strict, assign=assign)

    def folded(self, *, protocol: Any = None, public: Sequence[str] = ()) -> OptimizedModule:
        """A view for engines: in eval mode, the same outputs with fewer operations.

        Batch norms, scales and shifts fold into linear operators, polynomials of degree two
        complete the square, linear operators merge.  This module and its state stay as they are;
        the view's tensors are its own.  See `graphopt.private.folding.folded`.

        Args:
            protocol: A protocol's name, whose rounds and bytes decide which linear operators merge;
                default: those that cost no multiply-adds more.
            public: Names of parameters and buffers that both parties know, with ``*``.

        Raises:
            UsageError: There is no such protocol.
            VerificationError: The view computes something else.
        """
        return derived("folded", self, protocol=protocol, public=public)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write this module to a file, without pickle; `graphopt.load` reads it.

        Raises:
            UnsupportedError: It holds something that has no form in a file; says what.
            OutputError: The file can't be written.
        """
        from graphopt.ir.archive import save

        save(self, path)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        tensors = {id(t): copy.deepcopy(t, memo) for t in all_tensors(self)}
        result = copy_tree(self, _class_for(self._program), tensors)
        memo[id(self)] = result
        assert isinstance(result, OptimizedModule)
        old = self._program
        second = old.eval_module
        memo.update({id(kept): kept for kept in (old.history, old.signature)})
        program = old.replace(
            module=copy_graph(old.module),
            eval_module=None if second is None else copy_graph(second),
            planner=copy.deepcopy(old.planner, memo),
            report=copy.deepcopy(old.report, memo),  # it predicts with the planner: the copy's
        )
        _install(result, program)
        result.__dict__.update(copy.deepcopy(_own_state(self), memo))
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        document, tensors = self._packed()
        return _restored, (document, tensors, _objects(self), _own_state(self))

    def _packed(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        table = TensorTable()
        return encode_program(self._program, table), table.tensors

    @property
    def code(self) -> str:
        """The Python that runs, one line for each node."""
        return "\n".join(graph.code.text for graph in self._graphs)

    @property
    def report(self) -> Any:
        """What was done and what it cost, or None for a module that was only captured."""
        program = self._program
        report = program.report
        plain = program.slices is None and program.masks is None
        if plain or not dataclasses.is_dataclass(report):
            return report
        return dataclasses.replace(report, module=self)  # type: ignore[type-var]

    def __getattr__(self, name: str) -> Any:
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            program = self.__dict__.get("_program")
            if program is None:
                raise
            return _from_source(self, program.skeleton, name)


for _name in INNER_HOOKS:  # hooks on the whole module run as on any other
    setattr(OptimizedModule, _name, getattr(nn.Module, _name))

_INSTALLED = frozenset({"_program", "_graphs", "_planner", "_modules", "_parameters", "_buffers"})


def _own_state(module: OptimizedModule) -> dict[str, Any]:
    """What a user has put on the module: hooks, attributes, the mode."""
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _INSTALLED and not isinstance(value, torch.Tensor)
    }


def _objects(module: OptimizedModule) -> dict[str, Any]:
    """Parts of a program that pickle as ordinary objects."""
    program = module._program
    skeleton = program.skeleton
    return {
        "signatures": (program.signature, program.eval_signature),
        "planner": program.planner,
        "report": program.report,
        "history": program.history,
        "attributes": skeleton.attributes,
        "source": skeleton.source,
        "slices": program.slices,
    }


def _restored(
    document: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    objects: dict[str, Any],
    own: dict[str, Any],
) -> OptimizedModule:
    """Rebuild a pickled module."""
    program = decode_program(document, tensors, trust=True)
    skeleton = dataclasses.replace(
        program.skeleton, attributes=objects["attributes"], source=objects["source"]
    )
    program = program.replace(
        skeleton=skeleton,
        planner=objects["planner"],
        report=objects["report"],
        history=objects["history"],
        signature=objects["signatures"][0],
        eval_signature=objects["signatures"][1],
        slices=objects["slices"],
    )
    module = program.emit()
    module.__dict__.update(own)
    return module


def _from_source(module: OptimizedModule, skeleton: Skeleton, name: str) -> Any:
    """An attribute that only the source has: its values, its properties; its methods refuse."""
    if name in skeleton.attributes:
        return skeleton.attributes[name]
    if name in skeleton.methods:
        raise MissingMethodError(
            f"{module._class_name}.{name} on an optimized module",
            hint="only forward is captured; call this method on the source model",
        )
    source = skeleton.source
    if source is not None and name in skeleton.properties:
        return getattr(source, name).fget(module)
    if name in skeleton.properties and name in ("device", "dtype"):
        return _first_floating(module, name)
    if source is not None and hasattr(source, name):
        return getattr(source, name)
    raise AttributeError(f"{module._class_name!r} object has no attribute {name!r}")


def _first_floating(module: nn.Module, name: str) -> Any:
    tensors = [*module.parameters(), *module.buffers()]
    floating = [t for t in tensors if t.is_floating_point()] or tensors
    return getattr(floating[0], name) if floating else None


def _being_traced(flat: Sequence[torch.Tensor]) -> bool:
    """Whether someone records this call, who shall see the plain graph."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    if torch.fx.experimental.proxy_tensor.get_proxy_mode() is not None:
        return True
    plain = (torch.Tensor, nn.Parameter)
    return any(type(t) not in plain and isinstance(t, torch._subclasses.FakeTensor) for t in flat)


def emit(program: Program) -> OptimizedModule:
    """Make an `OptimizedModule` of a program; it shares the program's tensors."""
    replaced = _replaced(program)
    cls = _class_for(program)
    module = copy_tree(program.skeleton.root, cls, replaced)
    assert isinstance(module, OptimizedModule)
    _install(module, program)
    return module


def _replaced(program: Program) -> dict[int, Any]:
    """Tensors that passes put in place of the source's: id of the old one -> the new one."""
    result = {}
    root = program.skeleton.root
    for path, old in (*root.named_parameters(), *root.named_buffers()):
        try:
            new = lookup(program.module, path)
        except AttributeError:
            continue
        if new is not old:
            result[id(old)] = new
    return result


def _install(module: OptimizedModule, program: Program) -> None:
    """Bind a program to a module that holds its tensors."""
    root = _twin(module)
    bound = bind_graph(program.module, root)
    evaluated = program.eval_module
    if evaluated is not None:
        evaluated = bind_graph(evaluated, root)
    for name, value in vars(root).items():
        if isinstance(value, torch.Tensor):
            module.__dict__[name] = value
    program = program.replace(
        module=bound, eval_module=evaluated, skeleton=program.skeleton.rebuilt(root)
    )
    graphs = [_compiled(bound, program.signature)]
    if evaluated is not None:
        graphs.append(_compiled(evaluated, program.eval_signature or program.signature))
    state = module.__dict__
    state["_program"] = program
    state["_planner"] = program.planner
    state["_graphs"] = tuple(graphs)


def _twin(module: Container) -> Container:
    """A container that shares the module's tables: same tensors for ever, and no cycle."""
    twin = SequenceContainer() if isinstance(module, SequenceContainer) else Container()
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        twin.__dict__[name] = module.__dict__[name]
    for name in ("_path", "_class_name", "_repr", "_version"):
        twin.__dict__[name] = getattr(module, name)
    for name, value in vars(module).items():
        if isinstance(value, torch.Tensor):
            twin.__dict__[name] = value
    return twin


def _class_for(program: Program) -> type[OptimizedModule]:
    """A subclass whose ``forward`` shows the source's signature."""
    source = program.signature.python
    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)

    def forward(self: OptimizedModule, *args: Any, **kwargs: Any) -> Any:
        return OptimizedModule.forward(self, *args, **kwargs)

    parameters = list(source.parameters.values())
    if parameters and parameters[0].kind is not inspect.Parameter.POSITIONAL_ONLY:
        self_parameter = self_parameter.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    forward.__signature__ = source.replace(parameters=[self_parameter, *parameters])  # type: ignore[attr-defined]
    forward.__doc__ = OptimizedModule.forward.__doc__
    return type("OptimizedModule", (OptimizedModule,), {"forward": forward})

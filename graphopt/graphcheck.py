"""Is a program's graph well formed?  Lint, names, and fake-tensor metadata derived anew."""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from graphopt.errors import VerificationError, first_line
from graphopt.ir.untouched import autocast_off

if TYPE_CHECKING:
    from graphopt.ir.program import Program

_UNTESTABLE = (
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
)


def check_graphs(program: Program, pass_name: str) -> None:
    """Check all graphs of a program.

    Args:
        program: The program.
        pass_name: Who made it, for the error.

    Raises:
        VerificationError: The graph is malformed, a name dangles, or metadata is wrong.
    """
    for module in (program.module, program.eval_module):
        if module is None:
            continue
        check_structure(module, pass_name)
        check_metadata(module, pass_name)


def graphs_of(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """The module's graph and the sub-graphs of its higher-order ops, outermost first."""
    yield module
    for node in module.graph.find_nodes(op="get_attr"):
        value = _attribute(module, str(node.target))
        if isinstance(value, fx.GraphModule):
            yield from graphs_of(value)


def check_structure(module: fx.GraphModule, pass_name: str = "") -> None:
    """Lint a graph and its sub-graphs and resolve every name in them.

    Raises:
        VerificationError: Malformed graph, or a name that doesn't exist.
    """
    for graph_module in graphs_of(module):
        for node in graph_module.graph.nodes:
            if node.op in ("get_attr", "call_module"):
                _check_name(graph_module, node, pass_name)
        try:
            graph_module.graph.lint()
        except (RuntimeError, AssertionError, ValueError) as error:
            raise VerificationError(
                f"after {pass_name}: malformed graph: {error}", claim="lint", pass_name=pass_name
            ) from error
        if graph_module.graph.output_node() is None:
            raise VerificationError(f"after {pass_name}: no output", claim="lint")


def check_metadata(module: fx.GraphModule, pass_name: str = "") -> None:
    """Run every op on the fake tensors of its inputs and compare with the metadata it carries.

    Raises:
        VerificationError: A shape, dtype or device in the metadata is wrong or missing.
    """
    regions = _autocast_regions(module)
    for graph_module in graphs_of(module):
        mode = _fake_mode(graph_module)
        if mode is None:
            continue
        region = regions.get(id(graph_module), _NO_REGION)
        with _quiet(mode), torch.no_grad(), autocast_off(), region():
            for node in graph_module.graph.nodes:
                _check_node(node, mode, graph_module, pass_name)


_NO_REGION = contextlib.nullcontext


def _autocast_regions(module: fx.GraphModule) -> dict[int, Callable[[], Any]]:
    """By the identity of a sub-graph: the autocast that ``wrap_with_autocast`` runs it under."""
    found: dict[int, Callable[[], Any]] = {}
    for outer in graphs_of(module):
        for node in outer.graph.nodes:
            if node.target is torch.ops.higher_order.wrap_with_autocast:
                device, dtype, enabled, cache, body, *_ = node.args
                inner = _attribute(outer, str(body.target))
                region = functools.partial(torch.autocast, device, dtype, enabled, cache)
                found.update((id(graph), region) for graph in graphs_of(inner))
    return found


def _attribute(module: Any, target: str) -> Any:
    for part in target.split("."):
        module = getattr(module, part, None)
    return module


def _check_name(module: fx.GraphModule, node: fx.Node, pass_name: str) -> None:
    value: Any = module
    for part in str(node.target).split("."):
        if not hasattr(value, part):
            raise VerificationError(
                f"after {pass_name}: {node.target!r} doesn't exist in the module",
                claim="names",
                pass_name=pass_name,
                node=node,
            )
        value = getattr(value, part)


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    for node in module.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch._subclasses.FakeTensor):
                return leaf.fake_mode
    return None


@contextlib.contextmanager
def _quiet(mode: FakeTensorMode) -> Iterator[None]:
    """Keep the shape environment as it is: nothing that is derived here shall guard."""
    with contextlib.ExitStack() as stack:
        if mode.shape_env is not None:
            stack.enter_context(mode.shape_env.suppress_guards())
        yield


def _check_node(
    node: fx.Node, mode: FakeTensorMode, module: fx.GraphModule, pass_name: str
) -> None:
    stated = node.meta.get("val")
    if node.op == "get_attr":
        actual = _attribute(module, str(node.target))
        if isinstance(actual, torch.Tensor) and isinstance(stated, torch.Tensor):
            _compare(node, stated, actual, pass_name)
        return
    if node.op != "call_function":
        return
    if not _derivable(node):
        return
    try:
        derived = _run(node, mode)
    except _UnknownInputError:
        return
    except Exception as error:
        raise VerificationError(
            f"after {pass_name}: the op doesn't accept its inputs: {first_line(error)}",
            claim="metadata",
            pass_name=pass_name,
            node=node,
        ) from error
    _compare_all(node, stated, derived, pass_name)


class _UnknownInputError(Exception):
    """An input has no metadata (the result of an op that only has an effect)."""


def _derivable(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    if any(tag in node.target.tags for tag in _UNTESTABLE):
        return False
    return node.meta.get("val") is not None or bool(node.users)


def _run(node: fx.Node, mode: FakeTensorMode) -> Any:
    def value_of(argument: fx.Node) -> Any:
        if "val" not in argument.meta:
            raise _UnknownInputError
        return argument.meta["val"]

    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        # An in-place op may change the metadata of its input (`t_`, `squeeze_`): work on an alias.
        args, kwargs = pytree.tree_map(
            lambda x: x.detach() if isinstance(x, torch.Tensor) else x, (args, kwargs)
        )
    target: Any = node.target
    # As in tracing: ops with symbolic sizes decompose in Python, where they are known to work.
    with enable_python_dispatcher(), mode:
        return target(*args, **kwargs)


def _compare_all(node: fx.Node, stated: Any, derived: Any, pass_name: str) -> None:
    left = [x for x in pytree.tree_leaves(stated) if isinstance(x, torch.Tensor)]
    right = [x for x in pytree.tree_leaves(derived) if isinstance(x, torch.Tensor)]
    if len(left) != len(right):
        raise VerificationError(
            f"after {pass_name}: metadata states {len(left)} tensors, the op gives {len(right)}",
            claim="metadata",
            pass_name=pass_name,
            node=node,
        )
    for a, b in zip(left, right, strict=True):
        _compare(node, a, b, pass_name)


def _compare(node: fx.Node, stated: torch.Tensor, derived: torch.Tensor, pass_name: str) -> None:
    same_shape = len(stated.shape) == len(derived.shape) and all(
        _same_size(a, b) for a, b in zip(stated.shape, derived.shape, strict=True)
    )
    if same_shape and stated.dtype == derived.dtype and stated.device == derived.device:
        return
    raise VerificationError(
        f"after {pass_name}: metadata states {_describe(stated)}, but it is {_describe(derived)}",
        claim="metadata",
        pass_name=pass_name,
        node=node,
    )


def _same_size(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    left, right = _hint(a), _hint(b)
    return left is None or right is None or left == right


def _hint(size: Any) -> int | None:
    if isinstance(size, int):
        return size
    return size.node.hint if size.node.has_hint() else None  # unbacked sizes have none


def _describe(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device}"

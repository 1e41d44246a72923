"""Fake-tensor metadata of a program, derived anew: for loaded, moved and converted programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graphopt.ir.graphs import bind_graph, lookup
from graphopt.ir.guards import compile_expression
from graphopt.ir.interpret import Value, call, interpret, placed
from graphopt.ir.literals import retie
from graphopt.ir.program import Program
from graphopt.ir.regions import region
from graphopt.ir.signature import Leaf, Signature
from graphopt.ir.untouched import autocast_off


def is_stale(program: Program) -> bool:
    """Whether the graph's metadata is missing, or was made for other dtypes or devices."""
    for node in program.module.graph.nodes:
        if node.op not in ("placeholder", "get_attr"):
            continue
        value = node.meta.get("val")
        if node.op == "placeholder":
            if value is None:
                return True
            continue
        actual = lookup(program.module, str(node.target))
        if isinstance(actual, torch.Tensor) and (
            not isinstance(value, torch.Tensor)
            or value.dtype != actual.dtype
            or value.device != actual.device
            or value.shape != actual.shape
        ):
            return True
    return False


def refreshed(program: Program) -> Program:
    """The program with metadata and tied literals for its present tensors."""
    signature = _moved_signature(program)
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    inputs = fake_inputs(signature, mode)
    signature = dataclasses.replace(
        signature,
        inputs=tuple(
            dataclasses.replace(leaf, traced=_sizes(fake))
            for leaf, fake in zip(signature.inputs, inputs, strict=True)
        ),
    )
    by_name = dict(zip(signature.names, inputs, strict=True))
    module = retie(program.module, program.skeleton.root, by_name)
    propagate(module, inputs, mode)
    evaluated, eval_signature = program.eval_module, program.eval_signature
    if evaluated is not None:
        evaluated = retie(evaluated, program.skeleton.root, by_name)
        propagate(evaluated, inputs, mode)
        evaluated = bind_graph(evaluated, program.skeleton.root)
    if eval_signature is not None:
        eval_signature = dataclasses.replace(eval_signature, inputs=signature.inputs)
    return program.replace(
        module=bind_graph(module, program.skeleton.root),
        eval_module=evaluated,
        signature=signature,
        eval_signature=eval_signature,
    )


def _sizes(tensor: torch.Tensor) -> tuple[int | str, ...]:
    return tuple(s if isinstance(s, int) else str(s) for s in tensor.shape)


def _moved_signature(program: Program) -> Signature:
    """The signature with inputs converted and moved as the parameters were."""
    dtypes: dict[torch.dtype, torch.dtype] = {}
    devices: dict[torch.device, torch.device] = {}
    for node in program.module.graph.find_nodes(op="get_attr"):
        before, after = node.meta.get("val"), lookup(program.module, str(node.target))
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            if before.is_floating_point() and before.dtype != after.dtype:
                dtypes[before.dtype] = after.dtype
            if before.device != after.device:
                devices[before.device] = after.device
    if not dtypes and not devices:
        return program.signature

    def moved(leaf: Leaf) -> Leaf:
        dtype = dtypes.get(leaf.dtype, leaf.dtype)
        return dataclasses.replace(leaf, dtype=dtype, device=devices.get(leaf.device, leaf.device))

    return dataclasses.replace(
        program.signature, inputs=tuple(moved(leaf) for leaf in program.signature.inputs)
    )


def fake_inputs(signature: Signature, mode: FakeTensorMode) -> list[torch.Tensor]:
    """Symbolic fake tensors for the placeholders; sizes of one name share a symbol."""
    assert mode.shape_env is not None
    hints: dict[str, int] = {}
    for leaf in signature.inputs:
        for size, example in zip(leaf.traced, leaf.shape, strict=True):
            if isinstance(size, str) and size.isidentifier():
                hints.setdefault(size, max(example, 2))  # a size of one would be a constant
    symbols = {name: _symbol(mode.shape_env, name, hint) for name, hint in hints.items()}
    result = []
    with mode:
        for leaf in signature.inputs:
            sizes = [
                size if isinstance(size, int) else compile_expression(size)(symbols)
                for size in leaf.traced
            ]
            fake = torch.empty(sizes, dtype=leaf.dtype, device=leaf.device)
            result.append(fake.requires_grad_(leaf.requires_grad))
    return result


def _symbol(env: ShapeEnv, name: str, hint: int) -> Any:
    source = ConstantSource(f"__size_{name}")
    symbol = env.create_symbol(hint, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return env.create_symintnode(symbol, hint=hint, source=source)


def propagate(module: fx.GraphModule, inputs: Sequence[Any], mode: FakeTensorMode) -> None:
    """Run a graph on fake tensors and note what comes out in ``meta["val"]``."""
    with autocast_off(), mode, torch.enable_grad(), enable_python_dispatcher():
        _propagate(module, inputs, mode)


def _propagate(module: fx.GraphModule, inputs: Iterable[Any], mode: FakeTensorMode) -> Any:
    def attribute(node: fx.Node) -> Any:
        value = lookup(module, str(node.target))
        if isinstance(value, torch.Tensor):
            value = mode.from_tensor(value, static_shapes=True)
        return _note(node, value)

    def hook(node: fx.Node, value: Value) -> Any:
        return _note(node, _called(node, value, mode))

    given = placed(module.graph, inputs)
    for node, value in given.items():
        _note(node, value)
    return interpret(module.graph, given.values(), attribute, hook, copied=False)


def _called(node: fx.Node, value: Value, mode: FakeTensorMode) -> Any:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload) and "_assert_" in target._schema.name:
        return None
    if not isinstance(target, torch._ops.HigherOrderOperator):
        return call(node, value)
    args: Any = fx.map_arg(node.args, value)
    inner = region(target, args)
    if inner is not None:
        context, module, inputs = inner
        with context():
            return _propagate(module, inputs, mode)
    if target.name() == "cond":
        results = [_propagate(branch, args[3], mode) for branch in args[1:3]]
        return results[0]
    return call(node, value)


def _note(node: fx.Node, value: Any) -> Any:
    if not isinstance(value, fx.GraphModule):
        node.meta["val"] = fx.node.map_aggregate(value, _noted)
    return value


def _noted(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and not value.is_leaf else value

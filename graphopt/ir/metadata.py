"""Fake-tensor metadata of a program, derived anew: for loaded, moved and converted programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from graphopt.ir.graphs import bind_graph, lookup
from graphopt.ir.guards import compile_expression
from graphopt.ir.literals import retie
from graphopt.ir.program import Program
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
        _Propagator(module, mode).run(*inputs)


class _Propagator(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.mode = mode
        self.parameters: dict[int, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "output" and not isinstance(result, fx.GraphModule):
            n.meta["val"] = fx.node.map_aggregate(result, _noted)
        return result

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = lookup(self.module, str(target))
        return (
            self.mode.from_tensor(value, static_shapes=True)
            if isinstance(value, torch.Tensor)
            else value
        )

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = getattr(target, "_name", "")
        if name == "wrap_with_set_grad_enabled":
            with torch.set_grad_enabled(args[0]):
                return _Propagator(args[1], self.mode).run(*args[2:])
        if name == "wrap_with_autocast":
            device, dtype, enabled, _ = args[:4]
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                return _Propagator(args[4], self.mode).run(*args[5:])
        if name == "cond":
            results = [_Propagator(branch, self.mode).run(*args[3]) for branch in args[1:3]]
            return results[0]
        if isinstance(target, torch._ops.OpOverload) and "_assert_" in target._schema.name:
            return None
        return super().call_function(target, args, kwargs)


def _noted(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) and not value.is_leaf else value

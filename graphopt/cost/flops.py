"""FLOPs of graph nodes and of running code.

Counted are the ops that `torch.utils.flop_counter` counts (products, convolutions, attention), by
its formulas, plus two kinds that it leaves out: RNN layers and cells, and the CPU's fused
attention.
A multiply-add is two FLOPs; elementwise ops, reductions and normalisations count zero.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Hashable
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import conv_flop_count, flop_registry

from graphopt.cost.calls import Call, CallError, TensorSpec, describe, node_value
from graphopt.cost.sizes import Substitution, UnknownSizeError, concrete, symbolic

aten = torch.ops.aten
Shape = tuple[Any, ...]
Formula = Callable[..., Any]
_OWN: dict[Any, Formula] = {}
_RUNS: dict[Hashable, int] = {}


def flops(node: fx.Node, symbols: Substitution | None = None) -> int:
    """FLOPs of a node of a forward-level or joint graph.

    Args:
        node: A node whose inputs carry fake tensors in ``meta["val"]``.
        symbols: What stands for symbolic sizes; default: the hints.

    Returns:
        The count; sub-graphs of higher-order ops included, of ``cond`` the dearer branch.
    """
    if node.op != "call_function":
        return 0
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return _of_subgraphs(node, symbols)
    formula = _formula_of(node.target)
    if formula is not None:
        try:
            return int(_apply(formula, node, lambda size: concrete(size, symbols)))
        except (UnknownSizeError, CallError):
            return 0
        except _OtherShape:
            return _by_running(node, symbols)
    return _by_running(node, symbols) if _is_composite(node.target) else 0


def symbolic_flops(node: fx.Node) -> sympy.Expr:
    """`flops` as a sympy expression in the program's symbols.

    Ops without a closed form (``einsum`` and the like) give the number for the example sizes.
    """
    formula = _formula_of(node.target) if node.op == "call_function" else None
    if formula is None:
        return sympy.Integer(flops(node))
    try:
        return sympy.expand(_apply(formula, node, symbolic))
    except (_OtherShape, AssertionError, TypeError):  # shapes that are equal, but not by their form
        return sympy.Integer(flops(node))


def flops_for_shapes(node: fx.Node, shape_of: Callable[[fx.Node], Any]) -> Any:
    """FLOPs of a node whose tensors have other shapes than those that were traced.

    Args:
        node: A ``call_function`` node.
        shape_of: The shape of a node's output, a tuple of numbers or sympy expressions; a tuple of
            shapes for several outputs.

    Returns:
        The count, of the kind of the sizes; None for ops without a closed form.
    """
    formula = _formula_of(node.target) if node.op == "call_function" else None
    if formula is None:
        return None

    def shape(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return shaped(shape_of(value))
        return type(value)(map(shape, value)) if isinstance(value, (list, tuple)) else value

    def shaped(value: Any) -> Any:
        several = isinstance(value, tuple) and any(isinstance(part, tuple) for part in value)
        return tuple(map(shaped, value)) if several else _Shape(value or ())

    try:
        args, kwargs = map(shape, node.args), {k: shape(v) for k, v in node.kwargs.items()}
        return formula(*args, **kwargs, out_val=shape(node))
    except (_OtherShape, AssertionError, TypeError, ValueError):
        return None


def graph_flops(graph: fx.Graph, symbols: Substitution | None = None) -> int:
    """FLOPs of all nodes of a graph."""
    return sum(flops(node, symbols) for node in graph.nodes)


class FlopCounter(TorchDispatchMode):
    """Count the FLOPs of whatever runs inside, backward included.

    Unlike `torch.utils.flop_counter.FlopCounterMode` it follows no modules, so that code may call
    graph modules inside an `torch.autograd.Function`, and it counts what this file adds.

    Attributes:
        total: FLOPs so far.
        by_op: FLOPs by op.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.by_op: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """FLOPs so far."""
        return sum(self.by_op.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.HigherOrderOperator):
            return self._higher_order(func, args, kwargs)
        formula = _formula_of(func)
        if formula is None and _is_composite(func):
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None:
            count = formula(*args, **kwargs, out_val=result)
            self.by_op[str(func._overloadpacket)] += int(count)
        return result

    def _higher_order(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is torch.ops.higher_order.cond:
            predicate, true_branch, false_branch, operands = args
            with self:
                return (true_branch if predicate else false_branch)(*operands)
        return func(*args, **kwargs)


class _OtherShape(Exception):  # noqa: N818 - a signal, not an error
    """The closed form doesn't cover this call; running it on fake tensors does."""


def _formula_of(target: Any) -> Formula | None:
    packet = getattr(target, "_overloadpacket", target)
    own = _OWN.get(packet)
    return own if own is not None else flop_registry.get(packet)


def _is_composite(target: Any) -> bool:
    name = getattr(target, "name", None)
    if not isinstance(target, torch._ops.OpOverload) or name is None or target.namespace == "prim":
        return False  # the dispatcher doesn't know the few ops of `prim`
    return torch._C._dispatch_has_kernel_for_dispatch_key(name(), "CompositeImplicitAutograd")


def _apply(formula: Formula, node: fx.Node, size_of: Callable[[Any], Any]) -> Any:
    def shape(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return shape(node_value(value))
        if isinstance(value, torch.Tensor):
            return _Shape(size_of(size) for size in value.shape)
        if isinstance(value, (list, tuple)):
            return type(value)(shape(item) for item in value)
        if isinstance(value, torch.SymInt):
            return size_of(value)
        return value

    args = [shape(arg) for arg in node.args]
    kwargs = {name: shape(value) for name, value in node.kwargs.items()}
    return formula(*args, **kwargs, out_val=shape(node.meta.get("val")))


class _Shape(tuple):
    """A tensor's shape where the formulas expect tensors."""

    @property
    def shape(self) -> _Shape:
        return self


def _of_subgraphs(node: fx.Node, symbols: Substitution | None) -> int:
    counts = []
    for source in node.all_input_nodes:
        try:
            module = node_value(source) if source.op == "get_attr" else None
        except (CallError, AttributeError):
            module = None
        if isinstance(module, fx.GraphModule):
            counts.append(graph_flops(module.graph, symbols))
    if node.target is torch.ops.higher_order.cond:
        return max(counts, default=0)
    return sum(counts)


def _by_running(node: fx.Node, symbols: Substitution | None) -> int:
    try:
        call = describe(node, symbols)
    except (CallError, UnknownSizeError):
        return 0
    if call.key not in _RUNS:
        _RUNS[call.key] = _run_fake(call)
    return _RUNS[call.key]


def _run_fake(call: Call) -> int:
    def fake(value: Any) -> Any:
        if isinstance(value, TensorSpec):
            return torch.empty_strided(
                value.shape, value.stride, dtype=value.dtype, device=value.device
            )
        if isinstance(value, (list, tuple)):
            return [fake(item) for item in value]
        return value

    with FakeTensorMode(), torch.no_grad(), FlopCounter() as counter:
        try:
            call.target(*map(fake, call.args), **{k: fake(v) for k, v in call.kwargs})
        except Exception:  # no fake kernel, or a dependence on data: nothing counted is known
            return 0
    return counter.total


def _product(sizes: Any) -> Any:
    return reduce(operator.mul, sizes, 1)


def _shape(tensor: Any) -> Shape:
    return tuple(tensor.shape)


def _formula(*packets: Any) -> Callable[[Formula], Formula]:
    def register(formula: Formula) -> Formula:
        for packet in packets:
            _OWN[packet] = formula
        return formula

    return register


def _known(*names: str) -> list[Any]:
    """The ops of these names that this version of PyTorch has."""
    return [getattr(aten, name) for name in names if hasattr(aten, name)]


@_formula(aten.linear)
def _linear(x: Any, weight: Any, *_: Any, **__: Any) -> Any:
    return 2 * _product(_shape(x)) * _product(_shape(weight)[:-1])


@_formula(aten.matmul)
def _matmul(a: Any, b: Any, *_: Any, out_val: Any = None, **__: Any) -> Any:
    if len(_shape(a)) < 2 or len(_shape(b)) < 2:
        raise _OtherShape
    return 2 * _product(_shape(out_val)) * _shape(a)[-1]


@_formula(aten.conv1d, aten.conv2d, aten.conv3d)
def _conv(x: Any, weight: Any, *_: Any, out_val: Any = None, **__: Any) -> Any:
    return conv_flop_count(*_batched(x, weight, out_val))


@_formula(aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
def _conv_transpose(x: Any, weight: Any, *_: Any, out_val: Any = None, **__: Any) -> Any:
    return conv_flop_count(*_batched(x, weight, out_val), transposed=True)


def _batched(x: Any, weight: Any, out: Any) -> tuple[list[Any], list[Any], list[Any]]:
    lead = [1] if len(_shape(x)) < len(_shape(weight)) else []
    return [*lead, *_shape(x)], list(_shape(weight)), [*lead, *_shape(out)]


@_formula(
    *_known(
        "scaled_dot_product_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)
def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return _attention_products(query, key, value, scores=1, mixes=1)


@_formula(
    *_known(
        "_scaled_dot_product_flash_attention_for_cpu_backward",
        "_scaled_dot_product_fused_attention_overrideable_backward",
    )
)
def _attention_backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    # Scores are computed again; then one product each for the gradients of value and of the
    # weights, and two for those of query and key.
    return _attention_products(query, key, value, scores=3, mixes=2)


def _attention_products(query: Any, key: Any, value: Any, *, scores: int, mixes: int) -> Any:
    *lead, length, width = _shape(query)
    weights = _product(lead) * length * _shape(key)[-2]
    return 2 * weights * (scores * width + mixes * _shape(value)[-1])


def _recurrent(rows: Any, weights: Any) -> Any:
    # Every matrix (input, hidden and projection) meets every time step of every sequence once.
    return sum(2 * rows * _product(_shape(w)) for w in weights if len(_shape(w)) == 2)


@_formula(aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
def _rnn(x: Any, second: Any, third: Any, fourth: Any, *_: Any, **__: Any) -> Any:
    # Overload .input: (input, hx, params, has_biases, ...); .data: (data, sizes, hx, params, ...).
    packed = not isinstance(fourth, bool)
    rows = _shape(x)[0] if packed else _product(_shape(x)[:-1])
    return _recurrent(rows, fourth if packed else third)


@_formula(aten.lstm_cell, aten.gru_cell, aten.rnn_tanh_cell, aten.rnn_relu_cell)
def _rnn_cell(x: Any, _hx: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> Any:
    return _recurrent(_product(_shape(x)[:-1]), [w_ih, w_hh])


@_formula(*_known("mkldnn_rnn_layer"))
def _mkldnn_rnn(x: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> Any:
    return _recurrent(_product(_shape(x)[:-1]), [w_ih, w_hh])


@_formula(*_known("mkldnn_rnn_layer_backward"))
def _mkldnn_rnn_backward(x: Any, w_ih: Any, w_hh: Any, *_: Any, **__: Any) -> Any:
    return 2 * _recurrent(_product(_shape(x)[:-1]), [w_ih, w_hh])


@_formula(*_known("_cudnn_rnn"))
def _cudnn_rnn(x: Any, weights: Any, *_: Any, **__: Any) -> Any:
    return _recurrent(_product(_shape(x)[:-1]), weights)


@_formula(*_known("_cudnn_rnn_backward"))
def _cudnn_rnn_backward(x: Any, weights: Any, *_: Any, **__: Any) -> Any:
    return 2 * _recurrent(_product(_shape(x)[:-1]), weights)

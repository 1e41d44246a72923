"""Reading a graph: which values are known, which ops are linear, which scale and shift."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.graphs import lookup
from graphopt.ir.interpret import call
from graphopt.ir.ops import is_effectful, is_random
from graphopt.private.folding.affine import Affine, joined, made, number
from graphopt.private.folding.linear import Linear
from graphopt.private.folding.sheet import Known, Sheet, barred, same_kind

aten = torch.ops.aten

_NOTHING = {aten.alias.default, aten.detach.default}
_DROPOUTS = {
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.feature_alpha_dropout.default,
}  # fmt: skip
_GROWTH = 4
"""A value that is so many times larger than what it is made of is made when it is needed."""


def read(module: fx.GraphModule) -> Sheet:
    """A sheet of a graph without in-place ops where these can be avoided."""
    sheet = Sheet(module, barred=barred(module))
    _drop_idle(sheet)
    for node in list(sheet.graph.nodes):
        if node in sheet.barred:
            continue
        if node.op == "get_attr":
            _read_attribute(sheet, node)
        elif node.op == "call_function" and not _evaluate(sheet, node):
            _read_op(sheet, node)
    return sheet


def _drop_idle(sheet: Sheet) -> None:
    """Drop ops that do nothing in eval mode."""
    for node in sheet.nodes():
        dropout = node.target in _DROPOUTS and len(node.args) > 2 and node.args[2] is False
        if dropout or node.target in _NOTHING:
            sheet.replace(node, node.all_input_nodes[0])


# known values -------------------------------------------------------------------------------------


def _read_attribute(sheet: Sheet, node: fx.Node) -> None:
    value = lookup(sheet.module, str(node.target))
    if isinstance(value, Tensor) and not value.is_complex() and not value.is_quantized:
        sheet.known[node] = Known(_double(value.detach()), (str(node.target),))


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value


def _evaluate(sheet: Sheet, node: fx.Node) -> bool:
    """Note the value of a node that depends on no input; whether it does."""
    given = node.all_input_nodes
    if node.target is operator.getitem and given[0] in sheet.lists:
        sheet.known[node] = sheet.lists[given[0]][node.args[1]]  # type: ignore[index]
        return True
    if not given or not all(n in sheet.known for n in given):
        return False
    if not isinstance(node.target, torch._ops.OpOverload) or is_effectful(node) or is_random(node):
        return False
    values = [sheet.known[n] for n in given]
    with torch.no_grad():
        result = call(node, lambda n: sheet.known[n].value)
    parts = result if isinstance(result, (list, tuple)) else [result]
    most = _GROWTH * sum(v.value.numel() for v in values)
    if not all(isinstance(p, Tensor) and p.numel() <= most for p in parts):
        return False
    tied = bool(node.meta.get("ties")) or any(v.tied for v in values)
    sources = joined(*(v.sources for v in values))
    found = [Known(_double(part), sources, tied) for part in parts]
    if parts is result:
        sheet.lists[node] = found
    else:
        sheet.known[node] = found[0]
    return True


# ops ----------------------------------------------------------------------------------------------


def _read_op(sheet: Sheet, node: fx.Node) -> None:
    reader = _READERS.get(node.target)
    value = node.meta.get("val")
    if reader is None or not isinstance(value, Tensor) or not value.is_floating_point():
        return
    reader(sheet, node, _arguments(node))


def _arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments by name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    found = {}
    for place, argument in enumerate(target._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        given = node.args[place] if place < len(node.args) else default
        found[argument.name] = node.kwargs.get(argument.name, given)
    return found


Reader = Callable[[Sheet, fx.Node, dict[str, Any]], None]
_READERS: dict[object, Reader] = {}


def _reads(*targets: Any) -> Callable[[Reader], Reader]:
    def register(function: Reader) -> Reader:
        _READERS.update(dict.fromkeys(targets, function))
        return function

    return register


def _weights(sheet: Sheet, node: fx.Node, weight: Any, bias: Any) -> tuple[Known, Any] | None:
    """Weight and bias where both are known and of the result's dtype."""
    if weight not in sheet.known or (bias is not None and bias not in sheet.known):
        return None
    dtypes = {n.meta["val"].dtype for n in (node, weight, bias) if n is not None}
    if len(dtypes) != 1:
        return None
    return sheet.known[weight], None if bias is None else sheet.known[bias]


def _note_linear(
    sheet: Sheet, node: fx.Node, given: dict[str, Any], turned: bool = False, **options: Any
) -> None:
    x, weight = given["input"], given["weight"]
    found = _weights(sheet, node, weight, given.get("bias"))
    if found is None or not isinstance(x, fx.Node) or x in sheet.known:
        return
    known, bias = found
    sources = joined(known.sources, bias.sources if bias else ())
    value = known.value.t() if turned else known.value
    form = Linear(
        value, bias and bias.value, **options, sources=sources, home=known.sources[0]
    )  # fmt: skip
    sheet.note(node, form, next(i for i, a in enumerate(node.args) if a is x))


@_reads(aten.linear.default)
def _linear(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    if given["weight"].meta["val"].dim() == 2:
        _note_linear(sheet, node, given)


@_reads(aten.mm.default, aten.matmul.default)
def _matmul(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    x, weight = node.args[0], node.args[1]
    assert isinstance(x, fx.Node)
    assert isinstance(weight, fx.Node)
    if weight.meta["val"].dim() == 2 and x.meta["val"].dim() >= 1:
        _note_linear(sheet, node, {"input": x, "weight": weight}, turned=True)


@_reads(aten.addmm.default)
def _addmm(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    bias: Any = given["self"]
    plain = given["beta"] == 1 and given["alpha"] == 1
    if plain and bias.meta["val"].dim() == 1 and bias.meta["val"].shape[0] == sizes_out(node):
        wanted = {"input": given["mat1"], "weight": given["mat2"], "bias": bias}
        _note_linear(sheet, node, wanted, turned=True)


def sizes_out(node: fx.Node) -> Any:
    """Features of a result."""
    return node.meta["val"].shape[-1]


@_reads(
    aten.conv1d.default, aten.conv2d.default, aten.conv3d.default,
    aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding,
    aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input,
    aten.convolution.default,
)  # fmt: skip
def _conv(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    kernel = tuple(given["weight"].meta["val"].shape[2:])
    dims = len(kernel)
    dilation = _wide(given["dilation"], dims)
    padding = _padding(given["padding"], kernel, dilation)
    if padding is None:
        return
    transposed = given.get("transposed", "transpose" in str(node.target))
    _note_linear(
        sheet, node, given, dims=dims, stride=_wide(given["stride"], dims), padding=padding,
        dilation=dilation, output_padding=_wide(given.get("output_padding", 0), dims),
        transposed=transposed, groups=given["groups"],
    )  # fmt: skip


def _wide(value: Any, dims: int) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * dims if len(values) == 1 else values


def _padding(
    given: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...] | None:
    """Zeros on either side, or None where both sides have different numbers."""
    if not isinstance(given, str):
        return _wide(given, len(kernel))
    if given == "valid":
        return (0,) * len(kernel)
    total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    return None if any(t % 2 for t in total) else tuple(t // 2 for t in total)


# scales and shifts --------------------------------------------------------------------------------


@_reads(aten.batch_norm.default)
def _batch_norm(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    if given["training"] or not isinstance(node.args[0], fx.Node):
        return
    names = ("weight", "bias", "running_mean", "running_var")
    parts = {name: given.get(name) for name in names}
    if parts["running_mean"] is None or any(
        v is not None and v not in sheet.known for v in parts.values()
    ):
        return
    known = {name: sheet.known[v] for name, v in parts.items() if v is not None}
    scale = (known["running_var"].value + given["eps"]).rsqrt()
    if "weight" in known:
        scale = scale * known["weight"].value
    shift = -known["running_mean"].value * scale
    if "bias" in known:
        shift = shift + known["bias"].value
    axis = 1 - node.args[0].meta["val"].dim()
    sources = joined(*(v.sources for v in known.values()))
    _note_affine(sheet, node, made(scale, shift, axis, sources), 0)


@_reads(aten.neg.default)
def _neg(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    _note_affine(sheet, node, number(-1.0), 0)


@_reads(
    aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.add.Tensor,
    aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.rsub.Tensor,
)  # fmt: skip
def _arithmetic(sheet: Sheet, node: fx.Node, given: dict[str, Any]) -> None:
    first, second = node.args[0], node.args[1]
    op = opname(node)
    place = 0 if _is_free(sheet, first) else 1
    data, other = (first, second) if place == 0 else (second, first)
    if not _is_free(sheet, data) or _is_free(sheet, other) or (op == "div" and place):
        return
    found = _vector(sheet, node, other)
    if found is None:
        return
    value, axis, sources = found
    if op in ("mul", "div"):
        value = 1.0 / value if op == "div" else value
        form = made(value, value.new_zeros(()), axis, sources)
    else:
        scale, sign = _signs(op, float(given.get("alpha", 1)))[place]
        form = made(value.new_tensor(scale), sign * value, axis, sources)
    _note_affine(sheet, node, form, place)


def _signs(op: str, alpha: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Factors of data and constant, where the data comes first and where it comes second."""
    if op == "rsub":
        return (-alpha, 1.0), (1.0, -alpha)
    alpha = -alpha if op == "sub" else alpha
    return (1.0, alpha), (alpha, 1.0)


def opname(node: fx.Node) -> str:
    """The op's name without its overload."""
    return str(node.target).split(".")[1]


def _is_free(sheet: Sheet, value: Any) -> bool:
    """Whether a value depends on an input."""
    return isinstance(value, fx.Node) and value not in sheet.known


def _vector(
    sheet: Sheet, node: fx.Node, other: Any
) -> tuple[Tensor, int | None, tuple[str, ...]] | None:
    """A known operand as a number, or as a vector along one axis of the result."""
    if isinstance(other, bool) or other is None:
        return None
    if isinstance(other, (int, float)):
        return torch.tensor(float(other), dtype=torch.float64), None, ()
    if not isinstance(other, fx.Node):
        return None
    known = sheet.known[other]
    if not known.value.is_floating_point() or known.tied:
        return None
    wide = [i for i, n in enumerate(known.value.shape) if n != 1]
    if len(wide) > 1 or known.value.dim() > node.meta["val"].dim():
        return None
    if not wide:
        return known.value.reshape(()), None, known.sources
    return known.value.reshape(-1), wide[0] - known.value.dim(), known.sources


def _note_affine(sheet: Sheet, node: fx.Node, form: Affine, place: int) -> None:
    data = node.args[place]
    if isinstance(data, fx.Node) and data not in sheet.known and same_kind(data, node):
        finite = bool(form.scale.isfinite().all() and form.shift.isfinite().all())
        if finite:
            sheet.note(node, form, place)


# polynomials --------------------------------------------------------------------------------------


def product(sheet: Sheet, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The factors of a product of two values that depend on inputs; a square has one twice."""
    if node in sheet.barred or node.op != "call_function":
        return None
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or not same_kind(x, node):
        return None
    if node.target is aten.square.default:
        return x, x
    if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2:
        return x, x
    if node.target in (aten.mul.Tensor, operator.mul) and node not in sheet.forms:
        y = node.args[1]
        if isinstance(y, fx.Node) and same_kind(y, node):
            return x, y
    return None


_SUMS: dict[object, float] = {aten.add.Tensor: 1.0, aten.sub.Tensor: -1.0}


def addends(sheet: Sheet, node: fx.Node) -> tuple[tuple[fx.Node, fx.Node], float] | None:
    """The terms of a sum of two values of its sizes, and the sign of the second."""
    if node in sheet.barred or node.op != "call_function" or node in sheet.forms:
        return None
    sign = _SUMS.get(node.target)
    if sign is None or node.kwargs.get("alpha", 1) != 1 or len(node.args) != 2:
        return None
    first, second = node.args
    both = isinstance(first, fx.Node) and isinstance(second, fx.Node)
    if not both or not (same_kind(first, node) and same_kind(second, node)):  # type: ignore[arg-type]
        return None
    return (first, second), sign  # type: ignore[return-value]


def square_of(sheet: Sheet, before: fx.Node, x: fx.Node) -> fx.Node:
    """A new square in front of a node."""
    with sheet.graph.inserting_before(before):
        node = sheet.graph.call_function(aten.square.default, (x,))
    node.meta = {k: v for k, v in before.meta.items() if k in ("stack_trace", "nn_module_stack")}
    node.meta["val"] = x.meta["val"]
    return node

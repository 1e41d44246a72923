"""Graph surgery that capture and emission share: flat form, renaming, binding to a module tree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from graphopt.ir.signature import Guard, Leaf, Signature
from graphopt.ir.trees import Tree

_PREFIX = "model."
_DROPPED = ("aten::_assert_tensor_metadata",)
_REPEAT = re.compile(r"@\d+")


def clean_graph(module: fx.GraphModule, names: Sequence[str]) -> fx.GraphModule:
    """Bring the module of an exported `FlatCall` into flat form.

    Names of the wrapper are stripped, metadata asserts and unused tensors dropped, placeholders
    renamed, sub-graphs treated alike.  Returns a graph module that holds the tensors at the
    source's own paths.
    """
    taken = {
        name.split(".")[0] for name in vars(getattr(module, "model", module)).get("_modules", ())
    }
    result = _clean(module, taken, iter(names))
    result.recompile()
    return result


def _clean(module: fx.GraphModule, taken: set[str], names: Any) -> fx.GraphModule:
    graph = fx.Graph()
    root = nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            name = next(names, node.name)
            new = graph.placeholder(name)
            new.meta = dict(node.meta)
        elif node.op == "get_attr":
            new = _clean_attribute(module, node, graph, root, taken)
            if new is None:
                continue
        elif node.op == "call_function" and _is_dropped(node):
            continue
        elif node.op == "output":
            result = node.args[0]
            flat = tuple(result) if isinstance(result, (list, tuple)) else (result,)
            new = graph.output(fx.map_arg(flat, lambda n: env[n]))
        else:
            new = graph.node_copy(node, lambda n: env[n])
        if _returns_state(new):
            env[node] = new.args[0]  # type: ignore[assignment]
            _finish(new, node)
            continue
        _finish(new, node)
        env[node] = new
    graph.set_codegen(CodeGen())
    return fx.GraphModule(root, graph)


def _returns_state(node: fx.Node) -> bool:
    """Whether a node writes to a parameter or buffer and returns just that."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    name = target._schema.name.partition("::")[2]
    written = node.args[0] if node.args else None
    in_place = name.endswith("_") and not name.endswith("__") and len(target._schema.returns) == 1
    return in_place and isinstance(written, fx.Node) and written.op == "get_attr"


def _finish(new: fx.Node, node: fx.Node) -> None:
    new.meta["nn_module_stack"] = _strip_stack(node.meta.get("nn_module_stack"))
    new.meta.pop("from_node", None)


def mark_assignments(module: fx.GraphModule, paths: Sequence[str]) -> None:
    """Mark the copies that stand for assignments to buffers with ``meta["assign"]``."""
    for path in paths:
        for node in reversed(module.graph.nodes):
            copies = str(node.target) == "aten.copy_.default"
            written = node.args[0] if copies else None
            if isinstance(written, fx.Node) and str(written.target) == path:
                node.meta["assign"] = True
                break


def _is_dropped(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.name in _DROPPED


def _clean_attribute(
    module: fx.GraphModule, node: fx.Node, graph: fx.Graph, root: nn.Module, taken: set[str]
) -> fx.Node | None:
    value = lookup(module, str(node.target))
    if not node.users:
        return None
    if isinstance(value, fx.GraphModule):
        inner = _clean(value, taken, iter(()))
        target = str(node.target)
        while target in taken:
            target = f"_{target}"
        setattr(root, target, inner)
    else:
        target = str(node.target).removeprefix(_PREFIX)
        assign(root, target, value)
    name = re.sub(r"\W", "_", target)
    new = graph.create_node("get_attr", target, name=name)
    new.meta = dict(node.meta)
    return new


def _strip_stack(stack: Mapping[str, Any] | None) -> dict[str, Any]:
    """Drop the wrapper from an ``nn_module_stack``; repeated calls share their module's path."""
    result: dict[str, Any] = {}
    for path, cls in list((stack or {}).values())[1:]:
        path = "" if path == "model" else str(path).removeprefix(_PREFIX)
        path = _REPEAT.sub("", path)
        result[path] = (path, cls)
    return result


def lookup(root: Any, path: str) -> Any:
    """The attribute at a dotted path."""
    for part in path.split("."):
        root = getattr(root, part)
    return root


def assign(root: nn.Module, path: str, value: Any) -> None:
    """Set the attribute at a dotted path, making plain modules on the way."""
    *parents, name = path.split(".")
    for part in parents:
        if not hasattr(root, part):
            setattr(root, part, nn.Module())
        root = getattr(root, part)
    if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
        root._buffers.pop(name, None)
        vars(root)[name] = value
    else:
        setattr(root, name, value)


def bind_graph(module: fx.GraphModule, root: nn.Module) -> fx.GraphModule:
    """Make a graph module that reads the tensors of a tree of containers.

    It shares the tree's modules and its tables of parameters and buffers, so that both always hold
    the same tensors.  Tensors that the tree doesn't have (constants) are put into it.
    """
    bound = fx.GraphModule(nn.Module(), fx.Graph())
    bound.__dict__["_parameters"] = root._parameters
    bound.__dict__["_buffers"] = root._buffers
    bound.__dict__["_non_persistent_buffers_set"] = root._non_persistent_buffers_set
    for name, child in root._modules.items():
        bound._modules[name] = child
    for name, value in vars(root).items():
        if isinstance(value, torch.Tensor):
            vars(bound)[name] = value
    for node in module.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        value = lookup(module, target)
        if isinstance(value, fx.GraphModule):
            bound._modules[target] = value
        elif not _has(bound, target):
            assign(bound, target, value)
            if "." not in target:
                vars(root)[target] = value
    bound.graph = module.graph
    return bound


def _has(root: Any, path: str) -> bool:
    try:
        lookup(root, path)
    except AttributeError:
        return False
    return True


def free_sizes(
    signature: Signature, out_spec: Tree, module: fx.GraphModule, exported: Any
) -> Signature:
    """Complete a signature with what a trace found: free sizes, guards, the tree of outputs."""
    leaves = []
    placeholders = module.graph.find_nodes(op="placeholder")
    for leaf, node in zip(signature.inputs, placeholders, strict=True):
        traced = tuple(s if isinstance(s, int) else str(s) for s in node.meta["val"].shape)
        leaves.append(
            Leaf(
                leaf.name,
                leaf.path,
                leaf.shape,
                leaf.dtype,
                leaf.device,
                traced,
                leaf.requires_grad,
            )
        )
    guards = size_guards(getattr(exported, "_guards_code", ()), signature)
    return Signature(
        signature.parameters, signature.in_spec, out_spec, tuple(leaves), guards, signature.passed
    )


_SIZE = re.compile(r"L\['(?:flat|args)'\]\[(\d+)\]\.size\(\)\[(\d+)\]")


def size_guards(code: Sequence[str], signature: Signature) -> tuple[Guard, ...]:
    """Conditions on sizes among export's guards, without those that hold for any size."""
    guards = []
    for line in code:
        if not _SIZE.search(line) or "stride" in line:
            continue
        text = _SIZE.sub(lambda m: f"{signature.inputs[int(m[1])].path}.shape[{m[2]}]", line)
        condition = _SIZE.sub(r"s[\1][\2]", line)
        if re.fullmatch(r"\s*(2 <= s\[\d+\]\[\d+\]|s\[\d+\]\[\d+\] >= 2)\s*", condition):
            continue
        guards.append(Guard(text, condition))
    return tuple(guards)


def copy_graph(module: fx.GraphModule) -> fx.GraphModule:
    """Copy a graph module's graph and sub-graphs; tensors and node metadata are shared.

    ``meta`` dictionaries are copied one level deep, so that a copy's entries can be set.
    """
    graph = fx.Graph()
    root = nn.Module()
    env: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
        if node.op == "get_attr":
            value = lookup(module, str(node.target))
            inner = isinstance(value, fx.GraphModule)
            assign(root, str(node.target), copy_graph(value) if inner else value)
    graph.set_codegen(CodeGen())
    return fx.GraphModule(root, graph)


_PLACE = ("stack_trace", "nn_module_stack")


def copy_place(made: fx.Node, node: fx.Node, *more: str) -> None:
    """Note that a call that was made stands for another: its module and the user's line.

    Args:
        made: The new call.
        node: What it stands for.
        *more: Further entries of the metadata that hold of it as well.
    """
    made.meta.update({k: node.meta[k] for k in (*_PLACE, *more) if k in node.meta})


def set_argument(node: fx.Node, place: str, value: Any) -> None:
    """Set the argument at a place such as ``args.2`` or ``kwargs.size.0``."""
    kind, key, *rest = place.split(".")
    if kind == "kwargs":
        node.update_kwarg(key, _put(node.kwargs.get(key), rest, value))
    else:
        index = int(key)
        node.update_arg(index, _put(node.args[index], rest, value))


def _put(old: Any, rest: Sequence[str], value: Any) -> Any:
    if not rest:
        return value
    if isinstance(old, Mapping):
        return {**old, rest[0]: _put(old[rest[0]], rest[1:], value)}
    parts = list(old)
    parts[int(rest[0])] = _put(parts[int(rest[0])], rest[1:], value)
    return type(old)(parts)


def arguments(node: fx.Node) -> Iterator[tuple[str, Any]]:
    """All innermost arguments of a node with their places."""
    yield from _arguments("args", node.args)
    yield from _arguments("kwargs", node.kwargs)


def _arguments(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from _arguments(f"{place}.{index}", part)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _arguments(f"{place}.{key}", part)
    else:
        yield place, value


def get_argument(node: fx.Node, place: str) -> Any:
    """The argument at a place such as ``args.2``."""
    kind, key, *rest = place.split(".")
    value: Any = node.kwargs[key] if kind == "kwargs" else node.args[int(key)]
    for part in rest:
        value = value[part] if isinstance(value, Mapping) else value[int(part)]
    return value

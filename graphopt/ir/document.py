"""A program as JSON data beside its tensors: what saving, loading and pickling share."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphopt.errors import FileFormatError, UnsupportedError
from graphopt.ir import masks
from graphopt.ir.codec import Decoder, encode_module, encode_value
from graphopt.ir.graphs import bind_graph
from graphopt.ir.guards import compile_arithmetic
from graphopt.ir.literals import Literals
from graphopt.ir.program import PassRecord, Program
from graphopt.ir.signature import Guard, Leaf, Signature
from graphopt.ir.skeleton import (
    Container,
    ExtraStateContainer,
    SequenceContainer,
    Skeleton,
)
from graphopt.ir.slices import Slices
from graphopt.ir.targets import class_name
from graphopt.ir.trees import Tree, is_registered

Json = Any
_CONTAINERS = {
    "module": Container,
    "sequence": SequenceContainer,
    "extra": ExtraStateContainer,
}
_PARAMETER_KINDS = {kind.name: kind for kind in inspect._ParameterKind}
_OBJECT_MODULES = ("transformers.cache_utils",)


class TensorTable:
    """Tensors by key; one that is met twice (tied weights) has one key."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.keys: dict[int, str] = {}

    def add(self, tensor: torch.Tensor, name: str) -> str:
        """The key of a tensor, which is its first name."""
        if id(tensor) not in self.keys:
            self.keys[id(tensor)] = name
            self.tensors[name] = tensor
        return self.keys[id(tensor)]


# -- writing ---------------------------------------------------------------------------------------


def encode_program(program: Program, table: TensorTable) -> dict[str, Json]:
    """A program as JSON data; its tensors go into ``table``.

    The planner, the report and the skeleton's attributes are not part of it.

    Raises:
        UnsupportedError: Something in it has no form.
    """
    second = program.eval_module
    return {
        "module": encode_module(program.module),
        "eval_module": None if second is None else encode_module(second),
        "signature": _encode_signature(program.signature),
        "eval_signature": None
        if program.eval_signature is None
        else _encode_signature(program.eval_signature),
        "skeleton": _encode_skeleton(program.skeleton, table),
        "history": [_encode_record(record) for record in program.history],
        "literals": None
        if program.literals is None
        else [program.literals.dtype, program.literals.device],
        "branches": list(program.branches),
        "slices": None if program.slices is None else program.slices.to_dict(),
        "masks": None if program.masks is None else masks.to_dict(program.masks, table.add),
    }


def _encode_record(record: PassRecord) -> Json:
    from graphopt.plain import to_plain

    return [record.name, record.spec, record.changed, to_plain(record.report), record.seconds]


def _encode_signature(signature: Signature) -> Json:
    return {
        "parameters": [_encode_parameter(p) for p in signature.parameters],
        "in_spec": [_encode_tree(tree) for tree in signature.in_spec],
        "out_spec": _encode_tree(signature.out_spec),
        "inputs": [
            {
                "name": leaf.name,
                "path": leaf.path,
                "shape": list(leaf.shape),
                "dtype": encode_value(leaf.dtype),
                "device": encode_value(leaf.device),
                "traced": list(leaf.traced),
                "requires_grad": leaf.requires_grad,
            }
            for leaf in signature.inputs
        ],
        "guards": [[guard.text, guard.code] for guard in signature.guards],
        "passed": list(signature.passed),
    }


def _encode_parameter(parameter: inspect.Parameter) -> Json:
    default = parameter.default
    empty = default is inspect.Parameter.empty
    return {
        "name": parameter.name,
        "kind": parameter.kind.name,
        **({} if empty else {"default": encode_value(default)}),
    }


def _encode_tree(tree: Tree) -> Json:
    if tree.kind == "leaf":
        return "leaf"
    return {
        "kind": tree.kind,
        "type": None if tree.type is None else class_name(tree.type),
        "context": encode_value(tree.context),
        "children": [_encode_tree(child) for child in tree.children],
    }


def _encode_skeleton(skeleton: Skeleton, table: TensorTable) -> Json:
    containers: list[Json] = []
    index: dict[int, int] = {}

    def add(container: Container) -> int:
        if id(container) in index:
            return index[id(container)]
        number = index[id(container)] = len(containers)
        entry: dict[str, Json] = {}
        containers.append(entry)
        entry.update(_encode_container(container, table))
        entry["modules"] = {
            name: None if child is None else add(child)  # type: ignore[arg-type]
            for name, child in container._modules.items()
        }
        return number

    add(skeleton.root)
    return {
        "containers": containers,
        "properties": list(skeleton.properties),
        "methods": list(skeleton.methods),
        "flags": [[mode, dict(flags)] for mode, flags in skeleton.flags.items()],
    }


def _encode_container(container: Container, table: TensorTable) -> dict[str, Json]:
    path = container._path

    def key(name: str, tensor: torch.Tensor | None) -> str | None:
        return None if tensor is None else table.add(tensor, f"{path}.{name}" if path else name)

    kind = next(k for k, cls in reversed(_CONTAINERS.items()) if isinstance(container, cls))
    constants = {n: t for n, t in vars(container).items() if isinstance(t, torch.Tensor)}
    return {
        "kind": kind,
        "path": path,
        "class": container._class_name,
        "repr": container._repr,
        "version": container._version,
        "training": container.training,
        "extra_state": encode_value(container._extra_state) if kind == "extra" else None,
        "parameters": {
            name: [key(name, p), p is not None and p.requires_grad]
            for name, p in container._parameters.items()
        },
        "buffers": {
            name: [key(name, b), name not in container._non_persistent_buffers_set]
            for name, b in container._buffers.items()
        },
        "constants": {name: [key(name, c), c.requires_grad] for name, c in constants.items()},
    }


# -- reading ---------------------------------------------------------------------------------------


def decode_program(
    data: Mapping[str, Json], tensors: Mapping[str, torch.Tensor], *, trust: bool = False
) -> Program:
    """The program of JSON data and tensors.

    Raises:
        FileFormatError: The data is malformed.
        UnsafeFileError: It calls something that is not known to be harmless.
    """
    try:
        return _decode_program(data, tensors, trust)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RecursionError) as error:
        raise FileFormatError(
            f"a program that can't be read: {type(error).__name__}: {error}"
        ) from error


def _decode_program(
    data: Mapping[str, Json], tensors: Mapping[str, torch.Tensor], trust: bool
) -> Program:
    decoder = Decoder(trust=trust)
    skeleton = _decode_skeleton(data["skeleton"], tensors, decoder)
    modules = [
        None if part is None else _bound(decoder, part, skeleton.root)
        for part in (data["module"], data["eval_module"])
    ]
    signature = _decode_signature(data["signature"], decoder)
    second, slices, kept = data["eval_signature"], data.get("slices"), data.get("masks")
    if len(modules[0].graph.find_nodes(op="placeholder")) != len(signature.inputs):  # type: ignore[union-attr]
        raise FileFormatError("the graph's inputs don't fit the signature")
    return Program(
        modules[0],  # type: ignore[arg-type]
        modules[1],
        signature,
        skeleton,
        history=tuple(PassRecord(*record) for record in data["history"]),
        literals=None if data["literals"] is None else Literals(*data["literals"]),
        branches=tuple(data["branches"]),
        eval_signature=None if second is None else _decode_signature(second, decoder),
        slices=None if slices is None else Slices.from_dict(slices),
        masks=None if kept is None else masks.from_dict(kept, tensors),
    )


def _bound(decoder: Decoder, data: Json, root: nn.Module) -> Any:
    return bind_graph(decoder.module(data, root), root)


def _decode_signature(data: Json, decoder: Decoder) -> Signature:
    parameters = []
    for entry in data["parameters"]:
        default = inspect.Parameter.empty
        if "default" in entry:
            default = decoder.value(entry["default"])
        kind = _PARAMETER_KINDS[entry["kind"]]
        parameters.append(inspect.Parameter(entry["name"], kind, default=default))
    inputs = tuple(
        Leaf(
            entry["name"],
            entry["path"],
            tuple(entry["shape"]),
            decoder.value(entry["dtype"]),
            decoder.value(entry["device"]),
            tuple(entry["traced"]),
            bool(entry["requires_grad"]),
        )
        for entry in data["inputs"]
    )
    guards = tuple(Guard(text, code) for text, code in data["guards"])
    for guard in guards:
        compile_arithmetic(guard.code)
    return Signature(
        tuple(parameters),
        tuple(_decode_tree(tree, decoder) for tree in data["in_spec"]),
        _decode_tree(data["out_spec"], decoder),
        inputs,
        guards,
        tuple(data["passed"]),
    )


def _decode_tree(data: Json, decoder: Decoder) -> Tree:
    if data == "leaf":
        return Tree("leaf")
    kind = data["kind"]
    if kind not in ("static", "node", "dataclass", "object"):
        raise FileFormatError(f"a tree of unknown kind {kind!r:.100}")
    children = tuple(_decode_tree(child, decoder) for child in data["children"])
    context = decoder.value(data["context"])
    if kind == "static":
        return Tree(kind, type(context), context, children)
    cls = decoder.value({"class": data["type"]})
    _check_class(kind, cls, decoder.trust)
    return Tree(kind, cls, context, children)


def _check_class(kind: str, cls: type, trust: bool) -> None:
    """A file may not make objects of any class: rebuilding some of them has side effects."""
    allowed = {
        "node": is_registered(cls),
        "dataclass": dataclasses.is_dataclass(cls),
        "object": trust or cls.__module__ in _OBJECT_MODULES,
    }[kind]
    if not allowed:
        raise FileFormatError(
            f"the file makes objects of {class_name(cls)}, which is no known container",
            hint="register the class with torch.utils._pytree, or load with trust=True",
        )


def _decode_skeleton(data: Json, tensors: Mapping[str, torch.Tensor], decoder: Decoder) -> Skeleton:
    entries = data["containers"]
    containers = [_CONTAINERS[entry["kind"]]() for entry in entries]
    wrapped: dict[str, nn.Parameter] = {}
    for container, entry in zip(containers, entries, strict=True):
        _fill_container(container, entry, tensors, wrapped, decoder)
        for name, number in entry["modules"].items():
            container._modules[name] = None if number is None else containers[number]
    return Skeleton(
        containers[0],
        properties=tuple(data["properties"]),
        methods=tuple(data["methods"]),
        flags={bool(mode): dict(flags) for mode, flags in data["flags"]},
    )


def _fill_container(
    container: Container,
    entry: Json,
    tensors: Mapping[str, torch.Tensor],
    wrapped: dict[str, nn.Parameter],
    decoder: Decoder,
) -> None:
    def found(key: str) -> torch.Tensor:
        if key not in tensors:
            raise FileFormatError(f"the tensor {key!r:.200} is missing")
        return tensors[key]

    container._path = str(entry["path"])
    container._class_name = str(entry["class"])
    container._repr = str(entry["repr"])
    container._version = entry["version"]
    container.training = bool(entry["training"])
    if entry["kind"] == "extra":
        container._extra_state = decoder.value(entry["extra_state"])
    for name, (key, requires_grad) in entry["parameters"].items():
        if key is not None and key not in wrapped:
            tensor = found(key)
            is_parameter = isinstance(tensor, nn.Parameter)
            wrapped[key] = tensor if is_parameter else nn.Parameter(tensor, bool(requires_grad))
        container._parameters[name] = None if key is None else wrapped[key]
    for name, (key, persistent) in entry["buffers"].items():
        container._buffers[name] = None if key is None else wrapped.get(key, found(key))
        if not persistent:
            container._non_persistent_buffers_set.add(name)
    for name, (key, requires_grad) in entry["constants"].items():
        vars(container)[name] = found(key).requires_grad_(bool(requires_grad))


def encode_attributes(attributes: Mapping[str, Any]) -> dict[str, Json]:
    """Those attributes of a source model that files can hold (plain values, HF configs)."""
    result = {}
    for name, value in attributes.items():
        config = _config_of(value)
        try:
            result[name] = {"hf_config": config} if config else {"value": encode_value(value)}
        except UnsupportedError:
            continue
    return result


def _config_of(value: Any) -> Json:
    if type(value).__module__.split(".")[0] != "transformers" or not hasattr(value, "to_dict"):
        return None
    from graphopt.plain import to_plain

    try:
        return [class_name(type(value)), to_plain(value.to_dict())]
    except Exception:  # a config that can't be told as data is left out
        return None


def decode_attributes(data: Mapping[str, Json], *, trust: bool = False) -> dict[str, Any]:
    """Attributes as `encode_attributes` wrote them."""
    decoder = Decoder(trust=trust)
    result: dict[str, Any] = {}
    for name, entry in data.items():
        if "value" in entry:
            result[name] = decoder.value(entry["value"])
            continue
        config = _decode_config(entry["hf_config"], decoder)
        if config is not None:
            result[name] = config
    return result


def _decode_config(data: Json, decoder: Decoder) -> Any:
    name, content = data
    if not str(name).startswith("transformers."):
        raise FileFormatError(f"{name!r:.100} is no configuration of transformers")
    try:
        cls: Any = decoder.value({"class": name})
        from transformers import GenerationConfig, PretrainedConfig
    except (FileFormatError, ImportError):
        return None  # transformers isn't installed here; the attribute is missing then
    if not issubclass(cls, (PretrainedConfig, GenerationConfig)):
        raise FileFormatError(f"{name!r:.100} is no configuration of transformers")
    return cls.from_dict(content)

"""The file of an optimized module: one archive of JSON and safetensors, no pickle.

Writing a module and reading the document back happen here; `graphopt.persist` makes a module of it.

model.gopt (zip, stored)
graphopt.json         graphs, signature, modules, plans, report
weights.safetensors   each tensor once, tied weights by one name
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt import files
from graphopt.errors import FileFormatError, UnsafeFileError
from graphopt.ir.document import TensorTable, encode_attributes, encode_program
from graphopt.plain import to_plain

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule

FORMAT = "graphopt"
VERSION = 1
_JSON = "graphopt.json"
_WEIGHTS = "weights.safetensors"
_MAX_JSON = 1 << 29
_MAX_RATIO = 200


def save(module: OptimizedModule, path: str | os.PathLike[str]) -> None:
    """Write a module to a file, whole or not at all.

    Raises:
        UnsupportedError: It holds something that has no form in a file; says what.
        OutputError: The file can't be written.
    """
    document, tensors = pack(module)
    text = json.dumps(document, allow_nan=False).encode()
    weights = _weights(tensors)
    with files.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.writestr(_JSON, text, compress_type=zipfile.ZIP_DEFLATED)
        archive.writestr(_WEIGHTS, weights, compress_type=zipfile.ZIP_STORED)


def pack(module: OptimizedModule) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON document and the tensors of a module."""
    program = module._program
    table = TensorTable()
    encoded = encode_program(program, table)
    planner = program.planner
    layout = {
        key: list(tensor.stride())
        for key, tensor in table.tensors.items()
        if not tensor.is_contiguous()
    }
    document = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "program": encoded,
        "attributes": encode_attributes(program.skeleton.attributes),
        "planner": None
        if planner is None
        else {"kind": planner.kind, "data": to_plain(planner.to_dict())},
        "budget": None if program.report is None else dict(getattr(program.report, "budget", {})),
        "layout": layout,
        "training": module.training,
    }
    return document, table.tensors


def _weights(tensors: Mapping[str, torch.Tensor]) -> bytes:
    from safetensors.torch import save as to_bytes

    plain: dict[str, torch.Tensor] = {}
    seen: dict[int, str] = {}
    for key, tensor in tensors.items():
        value = tensor.detach().contiguous()
        pointer = value.untyped_storage().data_ptr()
        if value.numel() and pointer in seen:  # two views of one memory: each is written whole
            value = value.clone()
        seen[pointer] = key
        plain[key] = value.cpu()
    return to_bytes(plain)


def read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON document and the tensors of a file.

    Raises:
        FileFormatError: The file is corrupt, or not one of ours.
        UnsafeFileError: It holds more than plain weights and JSON.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive)
            text = archive.read(_JSON)
            weights = archive.read(_WEIGHTS)
        document = json.loads(text)
        _check_document(path, document)
        tensors = from_bytes(weights)
        for key, strides in document["layout"].items():
            tensors[key] = _with_strides(tensors[key], strides)
    except OSError as error:
        raise FileFormatError(f"{path} can't be read: {error.strerror or error}") from error
    except FileFormatError:
        raise
    except (
        zipfile.BadZipFile, SafetensorError, ValueError, KeyError, EOFError, RuntimeError,
        NotImplementedError, RecursionError, TypeError, AttributeError,
    ) as error:  # fmt: skip
        raise FileFormatError(f"{path} is corrupt or no graphopt file: {error}") from error
    return document, tensors


def _check_members(path: Path, archive: zipfile.ZipFile) -> None:
    members = {info.filename: info for info in archive.infolist()}
    extra = sorted(set(members) - {_JSON, _WEIGHTS})
    if extra or len(archive.infolist()) != len(members):
        raise UnsafeFileError(
            f"{path} holds members that don't belong there: {', '.join(extra[:5]) or 'duplicates'}",
            hint="a graphopt file holds graphopt.json and weights.safetensors, nothing else",
        )
    if len(members) != 2:
        raise FileFormatError(
            f"{path} is no graphopt file: graphopt.json or the weights are missing"
        )
    size = path.stat().st_size
    info = members[_JSON]
    if info.file_size > min(_MAX_JSON, _MAX_RATIO * max(info.compress_size, 1 << 10)):
        raise UnsafeFileError(f"{path}: graphopt.json unpacks to {info.file_size} bytes")
    if members[_WEIGHTS].file_size > size or members[_WEIGHTS].compress_type != zipfile.ZIP_STORED:
        raise UnsafeFileError(f"{path}: weights.safetensors is compressed or larger than the file")


def _check_document(path: Path, document: Any) -> None:
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FileFormatError(f"{path} is no graphopt file")
    if document.get("version") != VERSION:
        raise FileFormatError(
            f"{path} has format version {document.get('version')!r:.50}; this is version {VERSION}",
            hint="load it with the graphopt that wrote it",
        )
    needed = {"program", "attributes", "planner", "budget", "layout"}
    if not needed <= set(document) or not isinstance(document["layout"], dict):
        raise FileFormatError(f"{path} lacks parts of a graphopt file")


def _with_strides(tensor: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """The same values laid out as they were saved (``channels_last`` weights)."""
    if sorted(strides, reverse=True) != sorted(_dense(tensor, strides), reverse=True):
        return tensor
    result = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    return result.copy_(tensor)


def _dense(tensor: torch.Tensor, strides: list[int]) -> list[int]:
    """Strides of a tensor without gaps whose dimensions are ordered as ``strides`` orders them."""
    order = sorted(range(tensor.ndim), key=lambda i: (strides[i], tensor.shape[i]))
    result, step = [0] * tensor.ndim, 1
    for axis in order:
        result[axis] = step
        step *= max(tensor.shape[axis], 1)
    return result

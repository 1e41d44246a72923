"""The parts of a dumped Python file around its function: imports, tables, constants, a script."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import torch

from graphopt.inspect.document import Document, Slot
from graphopt.inspect.text import one_line
from graphopt.plain import human_bytes

_LARGEST_CONSTANT = 4 << 20


def header(document: Document, function: str, modules: set[str]) -> str:
    """Comments and imports; ``modules`` are further ones to import."""
    lines = [f"# {document.title}: {document.view}, printed by graphopt."]
    if document.history:
        lines.append(f"# Passes: {', '.join(document.history)}")
    if document.saved is not None:
        lines.append(f"# Saved for backward: {human_bytes(document.saved.total)}")
    lines.append(f"# Call {function}(state_dict, *inputs), or run this file [STATE_DICT.pt].")
    imports = ["base64", "math", "operator", "sys", "zlib"]
    lines = [one_line(line) for line in lines]
    lines += [f"import {name}" for name in imports] + ["", "import torch"]
    return "\n".join(lines + [f"import {name}" for name in sorted(modules)])


def tables(document: Document) -> str:
    """Types of the tensors that the function takes, and the constants that no state holds."""
    state = [s for s in document.state.values() if not is_packable(s)]
    constants = [s for s in document.state.values() if is_packable(s)]
    parts = ["def packed(data, dtype, shape):", "    if not data:"]
    parts += ["        return torch.empty(shape, dtype=dtype)"]
    parts += ["    raw = bytearray(zlib.decompress(base64.b64decode(data)))"]
    parts += ["    return torch.frombuffer(raw, dtype=dtype).reshape(shape)", "", ""]
    parts += _table("STATE", state) + _table("INPUTS", document.inputs)
    if document.view != "program":
        parts += _table("TANGENTS", document.tangents)
    parts += ["CONSTANTS = {"]
    parts += [f"    {s.name!r}: packed({_pack(s)}, {s.dtype}, {s.shape})," for s in constants]
    return "\n".join([*parts, "}"])


def docstring(document: Document) -> str:
    """The function's own docstring."""
    if document.view == "program":
        return '"""Flat outputs; buffers in `state` are updated as the model updates them."""'
    return '"""Flat outputs, and the gradients by name."""'


def main(document: Document, function: str) -> str:
    """What runs the function when the file is run."""
    names = "INPUTS" if document.view == "program" else "INPUTS, TANGENTS"
    shown = "outputs" if document.view == "program" else "(outputs, found)"
    lines = [
        "def example(shape, dtype):",
        "    if dtype.is_floating_point or dtype.is_complex:",
        "        return torch.rand(shape, dtype=dtype)",
        "    return torch.zeros(shape, dtype=dtype)",
        "",
        "",
        "def main():",
        "    state = {name: example(*spec) for name, spec in STATE.items()}",
        "    if len(sys.argv) > 1:",
        "        state.update(torch.load(sys.argv[1], weights_only=True))",
        f"    given = [example(*spec) for table in ({names},) for spec in table.values()]",
        "    with torch.no_grad():",
        f"        {shown} = {function}(state, *given)",
        "    for value in outputs:",
        "        print(tuple(value.shape) if isinstance(value, torch.Tensor) else value)",
    ]
    if document.view != "program":
        lines += ["    for name, value in found.items():"]
        lines += ["        print(name, None if value is None else tuple(value.shape))"]
    return "\n".join([*lines, "", "", 'if __name__ == "__main__":', "    main()", ""])


def _table(name: str, slots: Any) -> list[str]:
    rows = [f"    {s.name!r}: ({tuple(s.shape)}, {s.dtype})," for s in slots]
    return [f"{name} = {{", *rows, "}"]


def is_packable(slot: Slot) -> bool:
    """Whether a tensor is a constant that the file itself can carry."""
    constant = slot.constant
    if constant is None or constant.layout is not torch.strided or constant.is_meta:
        return False
    return constant.numel() * constant.element_size() <= _LARGEST_CONSTANT


def _pack(slot: Slot) -> str:
    assert slot.constant is not None
    flat = slot.constant.detach().cpu().contiguous().view(-1)
    if not flat.numel():
        return '""'
    raw = bytes(flat.view(torch.uint8).numpy().tobytes())
    return f'"{base64.b64encode(zlib.compress(raw, 9)).decode()}"'

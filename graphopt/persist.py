"""Loading optimized modules: from the document of a file to a module with plans and report."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt import registry
from graphopt.errors import FileFormatError, GraphoptError
from graphopt.ir.archive import read
from graphopt.ir.document import decode_attributes, decode_program
from graphopt.ir.program import Program
from graphopt.report import Report

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule


def load(path: str | os.PathLike[str], *, trust: bool = False) -> OptimizedModule:
    """Load a module that `OptimizedModule.save` wrote.

    Args:
        path: The file.
        trust: Resolve ops and classes that are not known to be harmless.

    Returns:
        The module, with its plans and its report.

    Raises:
        FileFormatError: The file is corrupt, or not one of ours.
        UnsafeFileError: It holds more than plain weights and JSON, or calls unknown code.
    """
    document, tensors = read(Path(path))
    try:
        module = unpack(document, tensors, trust=trust).emit()
        module.training = bool(document.get("training", True))
        return module
    except GraphoptError as error:
        if not isinstance(error, FileFormatError):
            raise FileFormatError(f"{path} can't be loaded: {error.message}") from error
        raise
    except (
        KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, SyntaxError,
    ) as error:  # fmt: skip
        raise FileFormatError(f"{path} can't be loaded: {error}") from error


def unpack(
    document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], *, trust: bool = False
) -> Program:
    """The program of a document and its tensors."""
    program = decode_program(document["program"], tensors, trust=trust)
    skeleton = program.skeleton.with_attributes(
        decode_attributes(document["attributes"], trust=trust)
    )
    program = program.replace(skeleton=skeleton)  # metadata is derived when first asked for
    planner = document["planner"]
    if planner is not None:
        cls = registry.planner(str(planner["kind"]))
        program = program.replace(planner=cls.from_dict(planner["data"]))
    if document["budget"] is not None:
        program = program.replace(report=Report.of(program, document["budget"]))
    return program

"""graphopt: graph transformations for PyTorch models under a budget.

    fast = graphopt.optimize(model, "memory=50%", example_inputs=(x,))

The names below are loaded on first use, so that `import graphopt` and the command line start
without waiting for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from graphopt import derived

if TYPE_CHECKING:
    from graphopt.api import capture, explain, frontier, load, optimize
    from graphopt.budget import Budget
    from graphopt.errors import (
        BudgetError,
        BudgetInfeasible,
        CaptureError,
        FileFormatError,
        GraphoptError,
        InputMismatch,
        ModelError,
        NonFiniteError,
        NothingToTrainError,
        OutputError,
        PipelineError,
        UnsafeFileError,
        UnsupportedError,
        UsageError,
        VerificationError,
    )
    from graphopt.ir.module import OptimizedModule
    from graphopt.ir.program import Program

_API = ("capture", "explain", "frontier", "load", "optimize")
_ERRORS = (
    "BudgetError",
    "BudgetInfeasible",
    "CaptureError",
    "FileFormatError",
    "GraphoptError",
    "InputMismatch",
    "ModelError",
    "NonFiniteError",
    "NothingToTrainError",
    "OutputError",
    "PipelineError",
    "UnsafeFileError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
)
_HOME = {
    **dict.fromkeys(_API, "graphopt.api"),
    **dict.fromkeys(_ERRORS, "graphopt.errors"),
    "Budget": "graphopt.budget",
    "OptimizedModule": "graphopt.ir.module",
    "Program": "graphopt.ir.program",
}

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "BudgetError",
    "BudgetInfeasible",
    "CaptureError",
    "FileFormatError",
    "GraphoptError",
    "InputMismatch",
    "ModelError",
    "NonFiniteError",
    "NothingToTrainError",
    "OptimizedModule",
    "OutputError",
    "PipelineError",
    "Program",
    "UnsafeFileError",
    "UnsupportedError",
    "UsageError",
    "VerificationError",
    "capture",
    "explain",
    "frontier",
    "load",
    "optimize",
]


def _folded(*args: Any, **kwargs: Any) -> Any:
    from graphopt.private.folding import folded

    return folded(*args, **kwargs)


def _report_html(report: Any) -> str:
    from graphopt.inspect.notebook import report_html

    return report_html(report)


def _program_html(program: Any) -> str:
    from graphopt.inspect.notebook import program_html

    return program_html(program)


derived.register("folded", _folded)
derived.register("report_html", _report_html)
derived.register("program_html", _program_html)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

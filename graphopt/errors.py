"""Every error that a user can meet.

Each carries what it is about (the graph node, the op, the line of the user's own code) and a hint
about what to do, and knows the exit code with which the command line ends.  This module imports
nothing but the standard library, so that every other module may use it.
"""

from __future__ import annotations

import difflib
import os
import traceback
from collections.abc import Iterable
from typing import Any, ClassVar

_HERE = os.path.dirname(__file__) + os.sep

EXIT_OK = 0
EXIT_USER = 1
EXIT_USAGE = 2
EXIT_CAPTURE = 3
EXIT_INFEASIBLE = 4
EXIT_VERIFICATION = 5
EXIT_DIFFERENT = 6
EXIT_INTERRUPTED = 130


class GraphoptError(Exception):
    """Base of all errors that graphopt raises on purpose.

    Attributes:
        message: What is wrong, in one sentence.
        node: Name of the graph node concerned, or None.
        op: Name of the op concerned, or None.
        user_line: The line of the user's source, as ``file:line: code``, or None.
        hint: What to do about it, or None.
        exit_code: Exit code of the command line for this class of errors.
    """

    exit_code: ClassVar[int] = EXIT_USER

    def __init__(
        self,
        message: str,
        *,
        node: Any = None,
        op: Any = None,
        user_line: str | None = None,
        hint: str | None = None,
    ) -> None:
        """Describe the error; ``node`` may be an FX node, which fills op and user_line in."""
        self.message = message
        self.node, self.op, self.user_line = _where(node, op, user_line)
        self.hint = hint
        super().__init__(self._text())

    def _text(self) -> str:
        place = [f"node: {self.node}"] if self.node else []
        place += [f"op: {self.op}"] if self.op else []
        place += [f"at: {self.user_line}"] if self.user_line else []
        place += [f"hint: {self.hint}"] if self.hint else []
        return "\n  ".join([self.message, *place])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, as ``--json`` prints it."""
        data = {k: v for k, v in self.__dict__.items() if _is_plain(v) and not k.startswith("_")}
        return {"error": type(self).__name__, "exit_code": self.exit_code, **data}

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call cls(*args) and lose every keyword.
        return _rebuild, (type(self), self.args, self.__dict__)


class UsageError(GraphoptError):
    """The request itself is malformed (an unknown option, a pass that doesn't exist)."""

    exit_code = EXIT_USAGE


class BudgetError(UsageError):
    """A budget that can't be read or makes no sense (``memroy=50%``, ``memory=0``)."""


class PipelineError(UsageError):
    """A pipeline that can't be read, or that names an unknown pass or option."""


class CaptureError(GraphoptError):
    """The model can't be captured as a graph."""

    exit_code = EXIT_CAPTURE


class BudgetInfeasible(GraphoptError):  # noqa: N818 - the design fixes this name
    """No plan keeps the budget.

    Attributes:
        field: The budget field, such as ``memory``.
        requested: What was asked for, in the field's unit (bytes for memory).
        smallest: The smallest budget that could be met, in the same unit, or None if unknown.
        obstacle: What stands in the way, such as the ops that are live at the peak.
        proven: Whether it is proven that no plan keeps ``requested``; if False, none was found.
        bound: A proven lower bound on any budget that can be met, or None.
    """

    exit_code = EXIT_INFEASIBLE

    def __init__(
        self,
        message: str,
        *,
        field: str = "memory",
        requested: float | None = None,
        smallest: float | None = None,
        obstacle: str | None = None,
        proven: bool = False,
        bound: float | None = None,
        **where: Any,
    ) -> None:
        """Describe which budget failed and which one would do."""
        self.field = field
        self.requested = requested
        self.smallest = smallest
        self.obstacle = obstacle
        self.proven = proven
        self.bound = bound
        super().__init__(message, **where)

    def _text(self) -> str:
        lines = [super()._text()]
        if self.smallest is not None:
            lines.append(f"smallest budget that could be met: {self.field}={_plain(self.smallest)}")
        if self.obstacle:
            lines.append(f"in the way: {self.obstacle}")
        lines.append("proven infeasible" if self.proven else "not proven infeasible")
        return "\n  ".join(lines)


class VerificationError(GraphoptError):
    """A pass broke its own claims, or a graph is not well formed.

    Attributes:
        claim: The claim that doesn't hold (``lint``, ``metadata``, ``outputs``, ...).
        pass_name: The pass after which it was found, or None.
    """

    exit_code = EXIT_VERIFICATION

    def __init__(
        self, message: str, *, claim: str = "", pass_name: str | None = None, **where: Any
    ) -> None:
        """Describe the claim that fails and the pass that made it."""
        self.claim = claim
        self.pass_name = pass_name
        super().__init__(message, **where)


class UnsupportedError(GraphoptError):
    """Something that is refused by name rather than guessed at."""


class MissingMethodError(UnsupportedError, AttributeError):
    """A method of the source that was not captured; `hasattr` sees that it isn't there."""


class RunError(GraphoptError, RuntimeError):
    """A call of a graph failed on the values that it was given; the cause is what it raised."""


class InputMismatch(GraphoptError):  # noqa: N818
    """Inputs don't fit the model or the program (number, structure, shape, dtype, device)."""


class NonFiniteError(GraphoptError):
    """NaN or infinity where a finite number is needed."""


class NothingToTrainError(GraphoptError):
    """A training budget for a model without a trainable parameter or differentiable output."""


class ModelError(GraphoptError):
    """A model that can't be found, built, copied, or is no ``torch.nn.Module``."""


class FileFormatError(GraphoptError):
    """A file that is corrupt, of an unknown version, or not what it claims to be."""


class UnsafeFileError(FileFormatError):
    """A file that could execute code when loaded; ``trust=True`` or ``--trust`` allows it."""


class OutputError(GraphoptError):
    """An output path that can't be written to."""


def suggest(word: str, known: Iterable[str]) -> str | None:
    """Return ``did you mean ...?`` for the closest known word, or None if nothing is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else None


def first_line(error: object) -> str:
    """The first line of an error's text (torch appends C++ stacks to some), or its type's name."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def user_line_of(node: Any) -> str | None:
    """Line of the user's source that an FX node came from, from its ``stack_trace`` meta.

    Returns:
        ``file:line: code`` of the innermost frame outside torch, or of the innermost frame, or
        None where the node carries no trace.
    """
    trace = (getattr(node, "meta", None) or {}).get("stack_trace")
    if not trace:
        return None
    return innermost_user_frame(str(trace))


def user_line_of_error(error: BaseException) -> str | None:
    """The innermost line outside torch and graphopt from which an exception came."""
    return innermost_user_frame("".join(traceback.format_tb(error.__traceback__)))


def innermost_user_frame(trace: str) -> str | None:
    """Pick the innermost frame outside torch and graphopt from a formatted stack trace."""
    frames: list[tuple[str, str]] = []
    for line in trace.splitlines():
        text = line.strip()
        if text.startswith('File "'):
            path, _, rest = text[len('File "') :].partition('", line ')
            frames.append((f"{path}:{rest.split(',')[0]}", ""))
        elif frames and text and not frames[-1][1] and not text.startswith("^"):
            frames[-1] = (frames[-1][0], text)
    library = ("/torch/", _HERE, "<frozen", "<eval_with_key>")
    mine = [f for f in frames if not any(part in f[0] for part in library)] or frames
    if not mine:
        return None
    place, code = mine[-1]
    return f"{place}: {code}" if code else place


def _plain(amount: float) -> str:
    return str(int(amount)) if amount == int(amount) else f"{amount:g}"


def _where(node: Any, op: Any, user_line: str | None) -> tuple[str | None, str | None, str | None]:
    if node is not None and hasattr(node, "meta"):  # an FX node
        user_line = user_line or user_line_of(node)
        op = node.target if op is None else op
        node = node.name
    return (
        None if node is None else str(node),
        None if op is None else str(op),
        user_line,
    )


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _rebuild(cls: type[GraphoptError], args: tuple[Any, ...], state: dict[str, Any]) -> Any:
    error = cls.__new__(cls)
    Exception.__init__(error, *args)
    error.__dict__.update(state)
    return error

"""Find the first pass, and within it the first rewrite, that breaks a check of the user's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.errors import UnsupportedError, UsageError, first_line
from graphopt.inspect.rewrites import Replay, Rewrite
from graphopt.instruments import Instrument
from graphopt.ir.program import Program

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule
    from graphopt.pipeline import Pass, PassContext, PassResult

Check = Callable[["OptimizedModule"], Any]
_RAISED = "the pass itself raised"
_PLAN = "it changed no node: what it planned, or handed to a later pass, breaks the check"
_APART = "its rewrites can't be told apart: the graphs in between aren't good first and bad last"


@dataclass(frozen=True)
class Finding:
    """What a bisection found.

    Attributes:
        index: Position of the pass in the pipeline.
        pass_: The first pass whose result breaks the check.
        error: What the pass raised, or how the check failed; None if it gave False.
        rewrite: The first rewrite of that pass with which the check fails, or None.
        position: Which rewrite of the pass it is, from 1, and how many there are.
        reason: Why there is no rewrite, or empty.
        before: The last program that passes.
        after: The first that doesn't: of that rewrite, else of the pass; None where it raised.
    """

    index: int
    pass_: Pass
    error: Exception | None
    rewrite: Rewrite | None
    position: tuple[int, int]
    reason: str
    before: Program = field(repr=False)
    after: Program | None = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        failed = None if self.error is None else f"{type(self.error).__name__}: {self.error}"
        return {
            "schema_version": 1,
            "pass": str(self.pass_),
            "index": self.index,
            "error": failed,
            "rewrite": None if self.rewrite is None else self.rewrite.to_dict(),
            "number": self.position[0],
            "of": self.position[1],
            "reason": self.reason,
        }

    def __str__(self) -> str:
        lines = [f"pass {self.index + 1}, {self.pass_}, breaks the check"]
        if self.error is not None:
            lines.append(f"  with {type(self.error).__name__}: {first_line(self.error)}")
        if self.rewrite is None:
            lines.append(f"  {self.reason}")
        else:
            number, count = self.position
            lines.append(f"  with rewrite {number} of {count}: {self.rewrite}")
            lines += [f"  at {source}" for source in self._sources()]
        return "\n".join(lines)

    def _sources(self) -> list[str]:
        changes = self.rewrite.changes if self.rewrite is not None else ()
        found = [c.before.source for c in changes if c.before is not None and c.before.source]
        return list(dict.fromkeys(found))[:3]


class Bisect(Instrument):
    """Keeps the programs of a run, and finds afterwards where a check begins to fail.

    The check takes a module (a copy) in the mode of the model and fails by raising or by giving
    something false other than None.  The first failing pass is searched by halving, so the check is
    asked about log2 of the passes; then the difference that this pass made is taken apart into
    rewrites that don't depend on each other (see `graphopt.inspect.rewrites`), which are replayed
    and halved in the same way.  What fails has to go on failing, as with any bisection.

        bisect = Bisect(check)
        graphopt.optimize(model, passes=..., instruments=[bisect], verify=False)
        print(bisect.finding())
    """

    def __init__(self, check: Check, *, training: bool = True) -> None:
        """Search for what breaks ``check`` on modules in this mode."""
        self.check, self.training = check, training
        self.programs: list[Program] = []
        self.passes: list[Pass] = []

    def start(self, program: Program, context: PassContext) -> None:
        """Keep the captured program."""
        self.programs, self.passes = [program], []

    def before(self, pass_: Pass, program: Program) -> None:
        """Keep the pass: it may raise."""
        self.passes.append(pass_)

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """Keep what the pass gave."""
        self.programs.append(result.program)

    def finding(self, raised: Exception | None = None) -> Finding | None:
        """What breaks the check, or None if nothing does.

        Args:
            raised: What the run ended with, if a pass raised it.

        Raises:
            UsageError: The check fails on the captured program already.
        """
        error = self._fails(self.programs[0])
        if error is not None:
            raise UsageError(
                f"the check fails on the captured model already: {_told(error)}",
                hint="it has to hold before any pass has run",
            )
        low = _last_good(len(self.programs), lambda i: self._fails(self.programs[i]) is None)
        if low + 1 < len(self.programs):
            return self._within(low)
        if raised is not None and len(self.passes) == len(self.programs):
            last = self.programs[-1]
            return Finding(low, self.passes[-1], raised, None, (0, 0), _RAISED, last, None)
        return None

    def _within(self, low: int) -> Finding:
        """Find the rewrite of the pass behind the last good program."""
        before, after = self.programs[low], self.programs[low + 1]
        failed = _reported(self._fails(after))

        def found(reason: str, rewrite: Rewrite | None = None, at: tuple[int, int] = (0, 0)) -> Any:
            return Finding(low, self.passes[low], failed, rewrite, at, reason, before, after)

        try:
            replay = Replay(before, after)
        except UnsupportedError as error:
            return found(error.message)
        count = len(replay.rewrites)
        if not count or self._fails(after.replace(planner=None)) is None:
            return found(_PLAN)
        for follow in ("before", "after"):
            good = _Good(self, replay, follow)
            if good(0) and not good(count):
                place = _last_good(count + 1, good)
                before, after = good.programs[place], good.programs[place + 1]
                failed = _reported(self._fails(after))
                return found("", replay.rewrites[place], (place + 1, count))
        return found(_APART)

    def _fails(self, program: Program) -> Exception | None:
        """How the check fails on a program, or None."""
        module = copy.deepcopy(program.emit()).train(self.training)
        try:
            answer = self.check(module)
        except Exception as error:  # a user's check may raise anything
            return error
        return None if answer is None or answer else _FALSE


class _Good:
    """Asks once about each number of rewrites."""

    def __init__(self, bisect: Bisect, replay: Replay, follow: str) -> None:
        self.bisect, self.replay, self.follow = bisect, replay, follow
        self.programs: dict[int, Program] = {}
        self.answers: dict[int, bool] = {}

    def __call__(self, count: int) -> bool:
        if count not in self.answers:
            self.programs[count] = self.replay.program(count, follow=self.follow)
            self.answers[count] = self.bisect._fails(self.programs[count]) is None
        return self.answers[count]


_FALSE = AssertionError("the check gave False")


def _reported(error: Exception | None) -> Exception | None:
    return None if error is _FALSE else error


def _told(error: Exception) -> str:
    return first_line(error) if error is _FALSE else f"{type(error).__name__}: {first_line(error)}"


def _last_good(count: int, good: Callable[[int], bool]) -> int:
    """The last place up to which all is good, by halving; place 0 is known to be good."""
    low, high = 0, count
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(middle) else (low, middle)
    return low

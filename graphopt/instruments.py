"""Instruments watch a pipeline run and never change it: verify, dump, time, bisect."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.comparison import Observation, nudged, observe, unequal
from graphopt.errors import VerificationError
from graphopt.files import ensure_writable_folder, write_text
from graphopt.graphcheck import check_graphs
from graphopt.pipeline import Pass, PassContext, PassResult, Pipeline, Preserves

if TYPE_CHECKING:
    from graphopt.ir.program import Program


class Instrument:
    """Told what happens in a pipeline run; the base does nothing."""

    def start(self, program: Program, context: PassContext) -> None:
        """The run begins with ``program``."""

    def before(self, pass_: Pass, program: Program) -> None:
        """``pass_`` is about to run on ``program``."""

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """``pass_`` ran on ``before`` for ``seconds`` and gave ``result``."""

    def finish(self, program: Program) -> None:
        """The run ended with ``program``."""


class Verify(Instrument):
    """Checks each pass's result: a well-formed graph, right metadata, and every claim.

    The graph is linted, every name in it has to exist, and the fake-tensor metadata is derived
    anew and compared.  What the pass claims in ``preserves`` is checked on the example inputs in
    train and in eval mode, with the same random seed before and after; the model, its gradients,
    buffers and the random state are left as they were.
    """

    def __init__(self, *, numeric: bool = True) -> None:
        """Check claims numerically unless ``numeric`` is False."""
        self.numeric = numeric
        self._context: PassContext | None = None
        self._seen: dict[bool, Observation] = {}

    def start(self, program: Program, context: PassContext) -> None:
        """Check the captured graph itself."""
        self._context = context
        self._seen.clear()
        check_graphs(program, "capture")

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """Check the graph and the claims of the pass.

        Raises:
            VerificationError: Names the claim, the pass and the worst difference.
        """
        if not result.changed and result.program.module is before.module:
            return  # at most something is handed to a later pass
        assert self._context is not None
        self._context.progress(f"verifying {pass_.name}")
        check_graphs(result.program, pass_.name)
        claims = result.preserves or pass_.preserves
        if claims.state_dict_keys:
            _check_keys(pass_, before, result.program)
        if self.numeric:
            for training in (True, False):
                self._check_numbers(pass_, claims, before, result.program, training)

    def _check_numbers(
        self, pass_: Pass, claims: Preserves, before: Program, after: Program, training: bool
    ) -> None:
        expected = self._seen.get(training) or self._observe(before, training)
        got = self._observe(after, training)
        self._seen[training] = got
        mode = "train" if training else "eval"
        if claims.shapes and expected.structure != got.structure:
            raise VerificationError(
                f"pass {pass_.name!r} changed the outputs in {mode} mode: "
                f"{expected.structure} became {got.structure}",
                claim="shapes",
                pass_name=pass_.name,
            )
        allowed = {k: getattr(claims, k) for k in ("outputs", "gradients", "buffers")}
        worst = unequal(
            expected,
            got,
            allowed,
            lambda: self._observe(before, training),
            None if _on_cpu(before) else lambda seed: self._observe(before, training, seed),
        )
        if worst is not None:
            raise VerificationError(
                f"pass {pass_.name!r} claims {worst.kind} within {allowed[worst.kind]:g}, but in "
                f"{mode} mode {worst.name} differs by {worst.error:.3g} (relative)",
                claim=worst.kind,
                pass_name=pass_.name,
                hint="this is a defect of the pass; run without it, and please report it",
            )

    def _observe(self, program: Program, training: bool, nudge: int | None = None) -> Observation:
        assert self._context is not None
        context = self._context
        module = program.emit()
        return observe(
            module if nudge is None else nudged(module, nudge),
            context.args,
            context.kwargs,
            training=training,
            loss=context.loss,
            seed=context.seed,
        )


def _on_cpu(program: Program) -> bool:
    """Whether kernels round as the source's do: elsewhere a library may choose others."""
    return all(t.device.type == "cpu" for t in program.emit().state_dict().values())


def _check_keys(pass_: Pass, before: Program, after: Program) -> None:
    old, new = set(before.emit().state_dict()), set(after.emit().state_dict())
    if old != new:
        changed = ", ".join(sorted(old ^ new)[:5])
        raise VerificationError(
            f"pass {pass_.name!r} changed the keys of the state dict: {changed}",
            claim="state_dict_keys",
            pass_name=pass_.name,
        )


class Dump(Instrument):
    """Writes the program before the first and after every pass: ``000_capture.py``, ...

    Files of an earlier run that match this pattern are removed first; nothing else is touched.
    """

    _OWN = re.compile(r"\d{3}_[\w-]+(\.model-explorer(-data)?)?\.(py|json|dot|svg|html)")

    def __init__(
        self,
        folder: str | os.PathLike[str],
        render: Callable[[Program, str], str],
        formats: Sequence[str] = ("py", "json"),
    ) -> None:
        """Write to ``folder``, which is made if it doesn't exist.

        Args:
            folder: Where to write.
            render: ``render(program, format)`` gives the text (`graphopt.inspect.dump`).
            formats: Which formats to write, one file each; those of Model Explorer are written to
                ``000_capture.model-explorer.json``.

        Raises:
            OutputError: The folder can't be written to.
        """
        self.folder = ensure_writable_folder(folder)
        self.render = render
        self.formats = tuple(formats)
        self.count = 0

    def start(self, program: Program, context: PassContext) -> None:
        """Remove an earlier run's files and write the captured program."""
        for path in self.folder.iterdir():
            if self._OWN.fullmatch(path.name):
                path.unlink()
        self.count = 0
        self._write("capture", program)

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """Write what the pass gave."""
        self._write(pass_.name, result.program)

    def _write(self, name: str, program: Program) -> None:
        plain = re.sub(r"[^\w-]", "_", name)
        stem = f"{self.count:03d}_{plain}"
        self.count += 1
        for form in self.formats:
            ending = f"{form}.json" if form.startswith("model-explorer") else form
            write_text(self.folder / f"{stem}.{ending}", self.render(program, form))


@dataclass
class Time(Instrument):
    """Collects the seconds of every pass, in order, as ``(pass text, seconds)``."""

    seconds: list[tuple[str, float]] = field(default_factory=list)

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """Note the time of the pass."""
        self.seconds.append((str(pass_), seconds))


@dataclass(frozen=True)
class Culprit:
    """What a bisection found.

    Attributes:
        index: Position of the first pass whose result is bad.
        pass_: That pass.
        before: The last good program.
        after: The bad one, or None where the pass itself raised.
        error: What the pass raised, or None.
    """

    index: int
    pass_: Pass
    before: Any
    after: Any
    error: Exception | None = None


def bisect(
    pipeline: Pipeline,
    program: Program,
    context: PassContext,
    good: Callable[[Program], bool],
) -> Culprit | None:
    """Find the first pass of a pipeline after which a program is bad.

    Passes run once each; the programs in between are searched by halving, so ``good`` is asked
    about log2 of their number.  It has to stay False once it is.

    Args:
        pipeline: The passes.
        program: What to start from; has to be good.
        context: What the passes may use.
        good: Whether a program is as it should be.

    Returns:
        The culprit, or None if the last program is good.

    Raises:
        ValueError: The program is bad before any pass.
    """
    if not good(program):
        raise ValueError("the program is bad before any pass has run")
    states: list[Any] = [program]
    failure: Exception | None = None
    for pass_, here in pipeline.steps(context):
        try:
            states.append(pass_.run(states[-1], here).program)
        except Exception as error:  # a third party's pass may raise anything
            failure = error
            break
    low, high = 0, len(states)  # states[low] is good; states[high] is bad, or beyond the end
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if good(states[middle]) else (low, middle)
    if high < len(states):
        return Culprit(low, pipeline.passes[low], states[low], states[high])
    if failure is not None:
        return Culprit(low, pipeline.passes[low], states[low], None, failure)
    return None

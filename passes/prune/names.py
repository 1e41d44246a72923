"""Names of parameters in options: which one matches, and what is said where none does."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Self

from torch import nn

from graphopt.errors import PipelineError, suggest
from graphopt.ir.program import Program


@dataclass(frozen=True)
class Freeze:
    """The option `freeze`: parameters that stay as they are.

    Attributes:
        globs: Names or globs of names.
    """

    globs: tuple[str, ...]

    @classmethod
    def read(cls, text: str, program: Program) -> Self:
        """Read globs separated by blanks.

        Raises:
            PipelineError: One matches no parameter or buffer of the program.
        """
        known = set(itertools.chain.from_iterable(all_names(program).values()))
        for glob in text.split():
            if not matches(glob, known):
                raise no_match("freeze", glob, known)
        return cls(tuple(text.split()))

    def reason(self, names: Collection[str]) -> str | None:
        """The option that freezes a tensor of these names, or None where it isn't frozen."""
        found = next((glob for glob in self.globs if matches(glob, names)), None)
        return None if found is None else f"freeze={found}"


def matches(glob: str, names: Iterable[str]) -> bool:
    """Whether any of some names matches."""
    return any(fnmatchcase(name, glob) for name in names)


def no_match(option: str, glob: str, known: Collection[str]) -> PipelineError:
    """The error of a glob that matches nothing; says what comes near."""
    inside = matches(f"{glob}.*", known)
    hint = f"a whole module is {option}={glob}.*" if inside else suggest(glob, known)
    return PipelineError(f"{option}: no parameter matches {glob!r}", hint=hint)


def all_names(program: Program) -> dict[int, list[str]]:
    """All names of each parameter and buffer, by its identity."""
    names: dict[int, list[str]] = {}
    root: nn.Module = program.skeleton.root
    for name, tensor in itertools.chain(
        root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)
    ):
        names.setdefault(id(tensor), []).append(name)
    return names

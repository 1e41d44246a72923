"""What is shown of an explanation, as data: for the terminal, for JSON and for the page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.errors import NonFiniteError, UsageError
from graphopt.inspect.relevance.colours import Image, as_array
from graphopt.inspect.relevance.images import as_photo, pixels

SCHEMA_VERSION = 1
TOP = 10
"""How many inputs and classes are listed."""
_CLASSES = 5
_SMALLEST_SIDE = 4  # of what is drawn as an image


@dataclass(frozen=True)
class Class:
    """A class that the model gives a score.

    Attributes:
        index: Its index.
        name: What it is called, or empty.
        score: Its score.
        share: Its softmax, in [0, 1].
    """

    index: int
    name: str
    score: float
    share: float


@dataclass(frozen=True)
class Attributed:
    """The relevance of one input of one sample.

    Attributes:
        name: The input's name.
        kind: How it is shown.
        relevance: Of the input's shape.
        tokens: Of a text.
        photo: Of an image.
    """

    name: str
    kind: Literal["image", "tokens", "values"]
    relevance: np.ndarray
    tokens: tuple[str, ...] = ()
    photo: Image | None = None

    def top(self, count: int = TOP) -> list[dict[str, Any]]:
        """The entries of the largest size: ``{"at", "relevance"}``, tokens with ``token``.

        Of images the pixels, at row and column.
        """
        values = pixels(self.relevance) if self.kind == "image" else self.relevance
        flat = values.ravel()
        order = np.argsort(-np.abs(flat), kind="stable")[:count]
        found = []
        for place in order.tolist():
            at = [int(i) for i in np.unravel_index(place, values.shape or (1,))]
            entry: dict[str, Any] = {"at": at, "relevance": float(flat[place])}
            found.append({**entry, "token": self.tokens[place]} if self.tokens else entry)
        return found


@dataclass(frozen=True)
class Sample:
    """One sample of a batch.

    Attributes:
        explained: The number that is explained.
        target: The class whose score that is; None: a function of the output.
        classes: The largest scores, the target's among them.
        ledger: Relevance by sink.
        inputs: The inputs.
    """

    explained: float
    target: Class | None
    classes: tuple[Class, ...]
    ledger: Mapping[str, float]
    inputs: tuple[Attributed, ...]

    @property
    def residual(self) -> float:
        """What the sinks are short of, relative to what is explained."""
        lost = abs(self.explained - sum(self.ledger.values()))
        return lost / abs(self.explained) if self.explained else lost


@dataclass(frozen=True)
class ExplanationView:
    """An explanation of a batch.

    Attributes:
        title: The model.
        settings: Composite, target, emitter and so on, as text.
        samples: The samples.
        others: What else got a relevance: ``{"name", "shape", "relevance", "size"}``.
        rules: ``{"family", "rule", "operations"}``: which rules were used, and how often.
        operations: What arrived at each operation, what it handed on and booked.
    """

    title: str
    settings: Mapping[str, str]
    samples: tuple[Sample, ...]
    others: tuple[Mapping[str, Any], ...]
    rules: tuple[Mapping[str, Any], ...]
    operations: tuple[Mapping[str, Any], ...]

    @property
    def worst(self) -> float:
        """The largest residual of an operation."""
        return max((each["residual"] for each in self.operations), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "schema_version": SCHEMA_VERSION,
            "model": self.title,
            "settings": dict(self.settings),
            "samples": [_plain(sample) for sample in self.samples],
            "others": [dict(each) for each in self.others],
            "rules": [dict(each) for each in self.rules],
            "largest_residual": self.worst,
            "operations": [dict(each) for each in self.operations],
        }


def _plain(sample: Sample) -> dict[str, Any]:
    return {
        "explained": sample.explained,
        "target": None if sample.target is None else vars(sample.target),
        "classes": [vars(each) for each in sample.classes],
        "ledger": dict(sample.ledger),
        "residual": sample.residual,
        "inputs": {
            each.name: {
                "kind": each.kind,
                "shape": list(each.relevance.shape),
                "relevance": float(each.relevance.sum()),
                "top": each.top(),
                **({"tokens": list(each.tokens)} if each.tokens else {}),
                **({"values": each.relevance.tolist()} if each.kind == "tokens" else {}),
            }
            for each in sample.inputs
        },
    }


def describe(
    module: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    title: str = "model",
    tokens: Sequence[Sequence[str]] | None = None,
    photos: Sequence[Any] | None = None,
    name_of: Callable[[int], str] = lambda index: "",
    settings: Mapping[str, str] | None = None,
) -> ExplanationView:
    """Explain a batch, and describe what was found.

    Args:
        module: What `graphopt.explain` gave.
        args: Positional inputs (a single tensor stands for a tuple of it).
        kwargs: Keyword inputs.
        title: Of the model.
        tokens: The text of the tokens of each sample; None: their ids.
        photos: An image for each sample (see `as_photo`) to lie under the relevance of the first
            image input; None: the inputs themselves, stretched.
        name_of: The name of a class.
        settings: Further settings that are shown.

    Raises:
        UsageError: Several targets at once; tokens or photos that don't fit.
        NonFiniteError: The output that is explained is NaN or infinite.
    """
    args = (args,) if isinstance(args, Tensor) else args
    kwargs = dict(kwargs or {})
    output, relevance, ledger = module(*args, **kwargs)
    explained = ledger["output"]
    if explained.ndim != 1:
        raise UsageError("several targets at once can't be shown", hint="explain one at a time")
    if not bool(torch.isfinite(explained).all()):
        raise NonFiniteError("the output that is explained is NaN or infinite")
    named = _inputs(module, args, kwargs)
    texts = _Texts(tokens, photos)
    samples = tuple(
        Sample(
            float(explained[i]),
            *_classes(module, output, i, name_of),
            {name: float(v[i]) for name, v in ledger.items() if name != "output"},
            tuple(
                texts.attributed(name, relevance[name], value, i)
                for name, value in named.items()
                if name in relevance
            ),
        )
        for i in range(len(explained))
    )
    return ExplanationView(
        title,
        {"composite": module.options.composite.name, **(settings or {})},
        samples,
        tuple(_other(name, v) for name, v in relevance.items() if name not in named),
        tuple(_coverage(module.rules())),
        tuple(module.conservation(*args, **kwargs)),
    )


def _inputs(module: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    program = module.model.program
    names = [n.name for n in program.module.graph.find_nodes(op="placeholder")]
    return dict(zip(names, program.signature.flatten_inputs(tuple(args), kwargs), strict=True))


def _classes(
    module: Any, output: Any, sample: int, name_of: Callable[[int], str]
) -> tuple[Class | None, tuple[Class, ...]]:
    scores = module.scores(output)
    if scores is None:
        return None, ()
    row = scores[sample].double()
    asked = module.options.target
    index = int(row.argmax()) if isinstance(asked, str) else int(_at(asked, sample)) % len(row)
    shares = row.softmax(0)

    def made(i: int) -> Class:
        return Class(i, name_of(i), float(row[i]), float(shares[i]))

    best = row.topk(min(_CLASSES, len(row))).indices.tolist()
    return made(index), tuple(made(i) for i in (best if index in best else [*best, index]))


def _at(target: Tensor, sample: int) -> Tensor:
    return target[sample] if target.ndim else target


class _Texts:
    """What people read instead of ids and normalised pixels."""

    def __init__(
        self, tokens: Sequence[Sequence[str]] | None, photos: Sequence[Any] | None
    ) -> None:
        self._tokens = tokens
        self._photos = photos

    def attributed(self, name: str, relevance: Tensor, value: Tensor, sample: int) -> Attributed:
        """One input of one sample; without a batch dimension the whole is its only sample."""
        found = as_array(relevance[sample] if relevance.ndim else relevance)
        own = value[sample] if value.ndim else value
        if not value.is_floating_point() and found.ndim < 3:
            return self._as_tokens(name, found, own, sample)
        if found.ndim == 3 and min(found.shape[1:]) >= _SMALLEST_SIDE:
            return Attributed(name, "image", found, photo=self._photo(own, sample))
        return Attributed(name, "values", found)

    def _as_tokens(self, name: str, found: np.ndarray, ids: Tensor, sample: int) -> Attributed:
        texts = [str(i) for i in ids.flatten().tolist()]
        if self._tokens is not None and sample < len(self._tokens):
            given = [str(t) for t in self._tokens[sample]]
            texts = given if len(given) == len(texts) else texts
        return Attributed(name, "tokens", found.ravel(), tuple(texts))

    def _photo(self, own: Tensor, sample: int) -> Image | None:
        if self._photos is not None and sample < len(self._photos):
            return as_photo(self._photos[sample])
        values = own / 255 if own.dtype == torch.uint8 else own.double()
        return as_photo(values) if own.shape[0] in (1, 3) else None


def _other(name: str, relevance: Tensor) -> dict[str, Any]:
    values = as_array(relevance)
    return {
        "name": name,
        "shape": list(values.shape),
        "relevance": float(values.sum()),
        "size": float(np.abs(values).sum()),
    }


def _coverage(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = Counter((each["family"], each["rule"]) for each in rules)
    return [{"family": f, "rule": r, "operations": n} for (f, r), n in sorted(found.items())]

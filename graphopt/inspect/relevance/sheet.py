"""All samples of an explanation as one picture."""

from __future__ import annotations

import io

from graphopt.errors import UsageError
from graphopt.inspect.relevance.colours import Image
from graphopt.inspect.relevance.images import enlarged, grid, heatmap, png
from graphopt.inspect.relevance.tokens import token_figure
from graphopt.inspect.relevance.view import Attributed, ExplanationView

MOST = 64


def sheet(view: ExplanationView) -> bytes:
    """A PNG: each image beside its heat map, or the bars of the first sample's tokens.

    Args:
        view: What `describe` gave; of more than `MOST` samples the first are drawn.

    Raises:
        UsageError: No input is an image or a text.
        UnsupportedError: A text, and matplotlib isn't installed.
    """
    drawn = [each for s in view.samples[:MOST] for each in s.inputs if each.kind == "image"]
    if drawn:
        first = [each for each in drawn if each.name == drawn[0].name]
        return png(grid([_pair(each) for each in first]))
    for sample in view.samples[:1]:
        for each in sample.inputs:
            if each.kind == "tokens":
                return _strip(each, view.title)
    raise UsageError(
        "no input of the model is an image or a text, so there is nothing to draw",
        hint="--html shows the largest entries of other inputs",
    )


def _pair(each: Attributed) -> Image:
    pictures = [] if each.photo is None else [each.photo]
    shown = [*pictures, heatmap(each.relevance, each.photo)]
    return grid([enlarged(p) for p in shown], columns=2)


def _strip(each: Attributed, title: str) -> bytes:
    buffer = io.BytesIO()
    figure = token_figure(each.tokens, each.relevance, title=title)
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()

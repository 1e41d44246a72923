"""Relevance of text: tokens on the colour of what they speak for or against."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from graphopt.charts import new_figure
from graphopt.errors import UsageError
from graphopt.inspect.relevance.colours import (
    as_array,
    hexadecimal,
    normalised,
    readable_on,
    scale_of,
)
from graphopt.inspect.relevance.images import bar

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.text import Text

_MARKS = {"\u0120": " ", "\u2581": " ", "\u010a": "\n"}  # how tokenizers write blanks and new lines


def readable(token: str) -> str:
    """A token of a byte-pair or SentencePiece vocabulary as people write it."""
    for mark, text in _MARKS.items():
        token = token.replace(mark, text)
    return token


def _shares(tokens: Sequence[str], relevance: Any, scale: float | None) -> list[float]:
    found = as_array(relevance)
    if found.shape != (len(tokens),):
        raise UsageError(
            f"relevance of shape {found.shape} for {len(tokens)} tokens",
            hint="give one value a token, one sample at a time",
        )
    return normalised(found, scale_of(found, 100.0) if scale is None else scale).tolist()


def token_html(tokens: Sequence[str], relevance: Any, *, scale: float | None = None) -> str:
    """A strip of tokens as HTML, each on its colour and with its relevance as a tooltip.

    Args:
        tokens: The tokens; whatever they hold is escaped.
        relevance: ``[tokens]``.
        scale: What gets the strongest colour; None: the largest.

    Returns:
        A ``<p class="strip">`` that needs no style sheet.

    Raises:
        UsageError: Not as many values as tokens.
        NonFiniteError: NaN.
    """
    spans = []
    values = as_array(relevance).tolist()
    for token, value, share in zip(tokens, values, _shares(tokens, relevance, scale), strict=True):
        style = f"background:{hexadecimal(share)};color:{readable_on(share)};padding:1px 3px"
        text = escape(_visible(readable(token)))
        spans.append(f'<span class="token" style="{style}" title="{value:+.4g}">{text}</span>')
    return '<p class="strip" style="line-height:1.9">' + "\u200b".join(spans) + "</p>"


def token_text(tokens: Sequence[str], relevance: Any, *, scale: float | None = None) -> Text:
    """The same for a terminal, as a rich text.

    Args:
        tokens: The tokens; markup in them is not read.
        relevance: ``[tokens]``.
        scale: What gets the strongest colour; None: the largest.
    """
    from rich.text import Text

    found = Text()
    for token, share in zip(tokens, _shares(tokens, relevance, scale), strict=True):
        style = f"{readable_on(share)} on {hexadecimal(share)}"
        found.append(_visible(readable(token)), style)
        found.append(" ")
    return found


def token_figure(
    tokens: Sequence[str], relevance: Any, *, scale: float | None = None, title: str = ""
) -> Figure:
    """The same as a matplotlib figure: one bar a token, coloured.

    Raises:
        UnsupportedError: matplotlib isn't installed.
    """
    shares = _shares(tokens, relevance, scale)
    values = as_array(relevance)
    figure = new_figure(max(4.0, 0.42 * len(tokens) + 1.5), 3.2, layout="constrained")
    axes = figure.subplots()
    places = range(len(tokens))
    filled = [hexadecimal(share) for share in shares]
    axes.bar(places, values, color=filled, edgecolor="#777", linewidth=0.5)
    axes.axhline(0, color="#333", linewidth=0.8)
    # A dollar sign would begin a formula.
    labels = [_visible(readable(t)).replace("$", r"\$") for t in tokens]
    axes.set_xticks(list(places), labels, rotation=60, ha="right")
    axes.set_ylabel("relevance")
    axes.set_title(title.replace("$", r"\$"), fontsize=10)
    bar(figure, axes, scale_of(values, 100.0) if scale is None else scale)
    return figure


def _visible(text: str) -> str:
    """Text of one line that shows something."""
    shown = "".join(c if c.isprintable() else "\u21b5" if c == "\n" else "\ufffd" for c in text)
    return shown if shown.strip() else "\u2423"

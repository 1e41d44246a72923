"""A self-contained HTML page of an explanation.

It needs no network and no script, and its policy forbids both; whatever it shows is escaped.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape

from graphopt.inspect.relevance.colours import Image, hexadecimal, scale_of
from graphopt.inspect.relevance.images import enlarged, heatmap, pixels, png
from graphopt.inspect.relevance.style import SINKS, STYLE
from graphopt.inspect.relevance.tokens import token_html
from graphopt.inspect.relevance.view import Attributed, Class, ExplanationView, Sample

MOST = 16
"""How many samples a page shows."""

_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)


def explanation_html(view: ExplanationView) -> str:
    """The page of an explanation.

    Args:
        view: What `describe` gave; of more than `MOST` samples the first are shown.
    """
    parts = [*_head(view)]
    for number, sample in enumerate(view.samples[:MOST]):
        parts += _sample(number, sample, alone=len(view.samples) == 1)
    if len(view.samples) > MOST:
        parts.append(f"<p>{len(view.samples) - MOST} samples more are not shown.</p>")
    parts += [*_others(view), *_rules(view), *_operations(view)]
    return _whole(f"{view.title} explained", parts)


def _whole(title: str, parts: Sequence[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def _text(value: object) -> str:
    """Text as it stands in HTML; unpaired surrogates can't be written to a file."""
    return escape(str(value).encode("utf-8", "replace").decode())


def _head(view: ExplanationView) -> Iterator[str]:
    yield f"<h1>{_text(view.title)}</h1>"
    yield "<dl>"
    for name, value in view.settings.items():
        yield f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>"
    yield "</dl>"


def _sample(number: int, sample: Sample, *, alone: bool) -> Iterator[str]:
    yield "<section>"
    title = "" if alone else f"Sample {number}: "
    yield f"<h2>{title}{_explained(sample)}</h2>"
    for each in sample.inputs:
        yield from _input(each)
    yield '<div class="columns">'
    if sample.classes:
        yield from _classes(sample)
    yield from _ledger(sample)
    yield "</div></section>"


def _explained(sample: Sample) -> str:
    if sample.target is None:
        return f"output {sample.explained:.4g}"
    return f"{_class_name(sample.target)}, score {sample.explained:.4g}"


def _class_name(found: Class) -> str:
    return _text(f"{found.name} ({found.index})" if found.name else f"class {found.index}")


def _input(each: Attributed) -> Iterator[str]:
    total = float(each.relevance.sum())
    yield f"<h3>{_text(each.name)}: relevance {total:.4g}</h3>"
    if each.kind == "image":
        yield from _pictures(each)
    elif each.kind == "tokens":
        yield f'<div class="card">{token_html(each.tokens, each.relevance)}</div>'
        yield _scale(scale_of(each.relevance, 100.0))
    else:
        yield from _values(each)


def _pictures(each: Attributed) -> Iterator[str]:
    shown: list[tuple[str, Image]] = []
    if each.photo is not None:
        shown.append(("input", each.photo))
        shown.append(("relevance over it", heatmap(each.relevance, each.photo)))
    shown.append(("relevance", heatmap(each.relevance)))
    yield '<div class="pictures">'
    for name, picture in shown:
        data = base64.b64encode(png(enlarged(picture))).decode()
        alt = _text(f"{name} of {each.name}" if name != "input" else each.name)
        yield (
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    yield "</div>"
    yield _scale(scale_of(pixels(each.relevance)))


def _scale(size: float) -> str:
    steps = ", ".join(hexadecimal(i / 8) for i in range(-8, 9))
    return (
        f'<div class="scale"><span>{-size:.3g} against</span>'
        f'<i style="background:linear-gradient(90deg, {steps})"></i>'
        f"<span>for {size:.3g}</span></div>"
    )


def _values(each: Attributed) -> Iterator[str]:
    rows = each.top()
    largest = max((abs(row["relevance"]) for row in rows), default=0.0) or 1.0
    yield '<div class="scroll"><table><tr><th>entry</th><th>relevance</th><th></th></tr>'
    for row in rows:
        at = ", ".join(map(str, row["at"])) or "0"
        value = row["relevance"]
        yield f"<tr><td>{at}</td><td>{value:+.4g}</td><td>{_two_sided(value / largest)}</td></tr>"
    yield "</table></div>"
    if each.relevance.size > len(rows):
        yield f'<p class="soft">{each.relevance.size - len(rows)} smaller ones are not listed.</p>'


def _two_sided(share: float) -> str:
    width, colour = 50 * abs(share), hexadecimal(0.66 if share >= 0 else -0.66)
    left = 50.0 if share >= 0 else 50 - width
    style = f"left:{left:.1f}%;width:{width:.1f}%;background:{colour}"
    return f'<div class="bar"><i style="{style}"></i></div>'


def _classes(sample: Sample) -> Iterator[str]:
    yield '<div class="card"><h3>Scores</h3><table>'
    for each in sample.classes:
        mark = ' class="target"' if each == sample.target else ""
        share = f"{100 * each.share:.1f}"
        yield (
            f"<tr{mark}><td>{_class_name(each)}</td><td>{each.score:.4g}</td>"
            f'<td><div class="bar one"><i style="left:0;width:{share}%"></i></div></td>'
            f"<td>{share} %</td></tr>"
        )
    note = "Bold: what is explained. Shares are a softmax of all scores."
    yield f'</table><p class="soft">{note}</p></div>'


def _ledger(sample: Sample) -> Iterator[str]:
    yield '<div class="card"><h3>Where the score comes from</h3>'
    size = sum(abs(v) for v in sample.ledger.values()) or 1.0
    parts = sorted(sample.ledger.items(), key=lambda item: item[1] >= 0)  # what is negative first
    yield '<div class="stack">'
    for name, value in parts:
        if value:
            kind = ' class="minus"' if value < 0 else ""
            title = _text(f"{name} {value:+.4g}")
            style = f"width:{100 * abs(value) / size:.2f}%;background-color:{_colour(name)}"
            yield f'<i{kind} style="{style}" title="{title}"></i>'
    yield "</div><table>"
    for name, value in sample.ledger.items():
        share = f"{100 * value / sample.explained:.2f} %" if sample.explained else ""
        key = f'<i class="key" style="background:{_colour(name)}"></i>'
        yield f"<tr><td>{key}{_text(name)}</td><td>{value:+.5g}</td><td>{share}</td></tr>"
    total = sum(sample.ledger.values())
    yield f'<tr class="total"><td>sum</td><td>{total:+.5g}</td><td></td></tr>'
    yield f"<tr><td>explained</td><td>{sample.explained:+.5g}</td><td></td></tr>"
    yield f"</table><p>Residual {sample.residual:.1e} of what is explained.</p></div>"


def _colour(sink: str) -> str:
    return SINKS.get(sink, "#999999")


def _others(view: ExplanationView) -> Iterator[str]:
    if not view.others:
        return
    yield "<section><h2>Parameters and values</h2>"
    heads = ("name", "shape", "relevance", "absolute")
    rows = (
        (e["name"], " × ".join(map(str, e["shape"])), f"{e['relevance']:+.4g}", f"{e['size']:.4g}")
        for e in view.others
    )
    yield _table(heads, rows)
    yield "</section>"


def _rules(view: ExplanationView) -> Iterator[str]:
    count = sum(each["operations"] for each in view.rules)
    yield f"<section><h2>Rules: {count} operations</h2>"
    rows = ((e["family"], e["rule"], str(e["operations"])) for e in view.rules)
    yield _table(("family", "rule", "operations"), rows)
    yield "</section>"


def _operations(view: ExplanationView) -> Iterator[str]:
    yield (
        f"<section><details><summary>What each operation received and handed on "
        f"(largest residual {view.worst:.1e})</summary>"
    )
    heads = ("node", "operator", "rule", "arrived", "handed on", "booked", "residual")
    yield _table(heads, map(_operation, view.operations))
    yield "</details></section>"


def _operation(each: Mapping[str, object]) -> tuple[str, ...]:
    sinks = each["sinks"]
    assert isinstance(sinks, Mapping)
    booked = ", ".join(f"{name} {value:+.3g}" for name, value in sinks.items() if value)
    figures = (f"{each['arrived']:+.5g}", f"{each['left']:+.5g}", booked, f"{each['residual']:.1e}")
    return (str(each["node"]), str(each["op"]), str(each["rule"]), *figures)


def _table(heads: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = ['<div class="scroll"><table><tr>' + "".join(f"<th>{_text(h)}</th>" for h in heads)]
    lines += ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return "\n".join([*lines, "</table></div>"])

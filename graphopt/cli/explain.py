"""`graphopt explain`: which inputs the output of a model rests on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from graphopt.cli.app import common
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import load_model


def _composites() -> dict[str, str]:
    """The composites of the pass that makes explanations: name -> TOML."""
    from graphopt import registry

    for cls in registry.serving("explanation"):
        if hasattr(cls, "composites"):
            return cls.composites()  # type: ignore[attr-defined]
    return {}


def _list(ctx: click.Context, _: click.Parameter, asked: bool) -> None:
    if asked:
        for name in _composites():
            click.echo(name)
        ctx.exit()


def _print(ctx: click.Context, _: click.Parameter, name: str | None) -> None:
    from graphopt.errors import UsageError, suggest

    if name is not None:
        known = _composites()
        if name not in known:
            hint = suggest(name, known) or f"known: {', '.join(known)}"
            raise UsageError(f"there is no composite {name!r}", hint=hint)
        click.echo(known[name], nl=False)
        ctx.exit()


def _numbers(name: str, text: str | None) -> tuple[float, ...]:
    from graphopt.errors import UsageError

    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise UsageError(
            f"--{name}={text!r}", hint="one number, or one a channel: .5,.5,.5"
        ) from None


@click.command()
@click.argument("model")
@click.option("--trust", is_flag=True, help="Load a model file even if it could run code.")
@click.option(
    "--composite",
    "-c",
    default="cp-lrp",
    show_default=True,
    metavar="NAME|FILE",
    help="Which rules apply where: a name, or a TOML file.",
)
@click.option(
    "--target",
    "-t",
    default="argmax",
    show_default=True,
    metavar="argmax|INT,...",
    help="What is explained: a class for all samples, or one for each.",
)
@click.option(
    "--attribute",
    "-a",
    multiple=True,
    metavar="GLOB",
    help="What gets a relevance besides: parameters, or names of parameters and nodes.",
)
@click.option("--emitter", type=click.Choice(["auto", "explicit"]), default="auto")
@click.option("--memory-budget", metavar="SIZE", help="Peak memory, such as 50% or 2GiB.")
@click.option("--input", "-i", "photo", metavar="FILE", help="A photo instead of the example.")
@click.option("--mean", metavar="LIST", help="Of its channels in [0, 1].  [default: config or .5]")
@click.option("--std", metavar="LIST", help="The same.  [default: config or .5]")
@click.option("--text", metavar="TEXT", help="A text instead of the example's token ids.")
@click.option("--tokenizer", metavar="PATH", help="Folder or file of its tokenizer.")
@click.option("--labels", metavar="FILE", help="Names of classes, one a line.")
@click.option("--html", metavar="FILE", help="Write a page there.")
@click.option("--png", metavar="FILE", help="Write the heat maps or the strip there.")
@click.option("--json", "as_json", is_flag=True, help="Print the explanation as JSON.")
@click.option(
    "--list-composites",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list,
    help="List the composites and exit.",
)
@click.option(
    "--print-composite",
    metavar="NAME",
    is_eager=True,
    expose_value=False,
    callback=_print,
    help="Print a composite as TOML and exit.",
)
@common
def explain(
    model: str,
    trust: bool,
    composite: str,
    target: str,
    attribute: tuple[str, ...],
    emitter: str,
    memory_budget: str | None,
    photo: str | None,
    mean: str | None,
    std: str | None,
    text: str | None,
    tokenizer: str | None,
    labels: str | None,
    html: str | None,
    png: str | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say which inputs the output of MODEL rests on.

    The model is explained in eval mode, on the factory's example inputs, a photo or a text.
    """
    from graphopt import api
    from graphopt.errors import UsageError
    from graphopt.files import ensure_writable
    from graphopt.inspect.relevance import describe

    if photo is not None and text is not None:
        raise UsageError("--input and --text exclude each other")
    means, stds = _numbers("mean", mean), _numbers("std", std)
    index, rules = _target(target), _composite(composite)
    for path in (html, png):
        if path is not None:
            ensure_writable(path)
    names = _labels(labels)
    given = _given(load_model(model, trust=trust), photo, (means, stds), text, tokenizer)
    loaded = given.loaded
    with progress(quiet) as told:
        told("building the explanation")
        module = api.explain(
            loaded.model,
            loaded.args,
            example_kwargs=loaded.kwargs,
            composite=rules,
            target=index,
            attribute=("inputs", *attribute),
            memory_budget=memory_budget,
            emitter=emitter,
            progress=told,
        )
        told("explaining")
        view = describe(
            module,
            loaded.args,
            loaded.kwargs,
            title=model,
            tokens=given.tokens,
            photos=given.photos,
            name_of=_namer(names, given),
            settings=_settings(target, emitter, memory_budget, photo),
        )
        told("drawing")
        _write(view, html, png)
    for path in (html, png):
        if path is not None:
            message(f"wrote {path}")
    if as_json:
        show_json(view.to_dict())
    else:
        from graphopt.cli.explanation import tables

        for each in tables(view):
            show(each)


def _target(text: str) -> Any:
    from graphopt.errors import UsageError

    if text == "argmax":
        return text
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        hint = "argmax, a class index, or one for each sample: 3,5,1"
        raise UsageError(f"--target={text!r}", hint=hint) from None
    return found[0] if len(found) == 1 else found


def _composite(text: str) -> str:
    """A composite's name, or the text of its file."""
    from graphopt.errors import FileFormatError, UsageError, suggest

    if text in (known := _composites()) or not known:
        return text
    path = Path(text)
    if path.suffix != ".toml" and not path.is_file():
        hint = suggest(text, known) or f"known: {', '.join(known)}; or a TOML file"
        raise UsageError(f"there is no composite {text!r}", hint=hint)
    return _read(path, FileFormatError) + "\n"


def _read(path: Path, kind: Any) -> str:
    from graphopt.errors import first_line

    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise kind(f"{path} can't be read: {first_line(error)}") from error


def _labels(file: str | None) -> list[str]:
    from graphopt.errors import FileFormatError

    return [] if file is None else _read(Path(file), FileFormatError).splitlines()


def _given(
    loaded: Any, photo: str | None, scales: tuple[Any, Any], text: str | None, tokenizer: str | None
) -> Any:
    from graphopt.cli.inputs import Given, with_photo, with_text

    if photo is not None:
        return with_photo(loaded, photo, *scales)
    if text is not None:
        return with_text(loaded, text, tokenizer)
    return Given(loaded)


def _namer(names: list[str], given: Any) -> Any:
    """From a class index to a name: of the file of labels, the model's config, or a token."""
    config = getattr(given.loaded.model, "config", None)
    known = getattr(config, "id2label", None) or {}
    words = getattr(config, "vocab_size", None) if given.token_of is not None else None
    named_itself = any(str(name) != f"LABEL_{i}" for i, name in known.items())

    def name_of(index: int) -> str:
        if index < len(names):
            return names[index].strip()
        if named_itself and index in known:
            return str(known[index])
        return given.token_of(index) if words is not None and len(known) != words else ""

    return name_of


def _settings(
    target: str, emitter: str, memory_budget: str | None, photo: str | None
) -> dict[str, str]:
    given = {"input": photo, "memory budget": memory_budget}
    return {
        "target": target,
        "emitter": emitter,
        **{name: value for name, value in given.items() if value is not None},
    }


def _write(view: Any, html: str | None, png: str | None) -> None:
    from graphopt.files import write_text, write_with
    from graphopt.inspect.relevance import explanation_html
    from graphopt.inspect.relevance.sheet import sheet

    if html is not None:
        write_text(html, explanation_html(view))
    if png is not None:
        data = sheet(view)
        write_with(png, lambda path: path.write_bytes(data))

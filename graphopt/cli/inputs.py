"""What a model is explained on: a photo or a text in place of the example inputs."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.cli.models import Loaded
from graphopt.errors import FileFormatError, UnsupportedError, UsageError, first_line

_MASKS = ("attention_mask", "mask", "input_mask")


@dataclass(frozen=True)
class Given:
    """Inputs of a model, and what they look like to people.

    Attributes:
        loaded: The model with the inputs.
        photos: An image ``(height, width, 3)`` for each sample, or None.
        tokens: The text of each sample's tokens, or None.
        token_of: The text of a token id, where there is a tokenizer.
    """

    loaded: Loaded
    photos: Sequence[Any] | None = None
    tokens: Sequence[Sequence[str]] | None = None
    token_of: Callable[[int], str] | None = None


def with_photo(loaded: Loaded, file: str, mean: Sequence[float], std: Sequence[float]) -> Given:
    """Put a photo in place of the first image among the example inputs.

    It is cut to the largest centred part of the right proportions, scaled to the example's size,
    brought to [0, 1] and normalised.

    Args:
        loaded: The model, with an example input ``[batch, 1 or 3, height, width]``.
        file: The photo.
        mean: Of each channel, or of all; empty: of the model's config, else .5.
        std: The same.

    Raises:
        UsageError: The model takes no image; mean or std don't fit.
        UnsupportedError: Pillow isn't installed.
        FileFormatError: The file is no image that Pillow reads.
    """
    place, example = _first(loaded, _is_image, "an image: a float input [batch, 1 or 3, h, w]")
    channels, height, width = example.shape[1:]
    photo = read_photo(file, (width, height), grey=channels == 1)
    pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8)
    values = pixels.reshape(height, width, channels).permute(2, 0, 1).to(example.dtype) / 255
    config = getattr(loaded.model, "config", None)
    means = _by_channel("mean", mean or getattr(config, "image_mean", None), channels)
    stds = _by_channel("std", std or getattr(config, "image_std", None), channels)
    if not bool((stds > 0).all()):
        raise UsageError("--std is positive")
    image = ((values - means.to(values)) / stds.to(values))[None].to(example.device)
    return Given(_with(loaded, {place: image}), [pixels.reshape(height, width, channels).numpy()])


def read_photo(file: str, size: tuple[int, int], *, grey: bool = False) -> Any:
    """Read a photo, cut out its middle and scale it.

    Args:
        file: The file.
        size: Width and height that it shall have.
        grey: One channel instead of three.

    Returns:
        A Pillow image.

    Raises:
        UnsupportedError: Pillow isn't installed.
        FileFormatError: The file is no image that Pillow reads.
    """
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise UnsupportedError(
            "photos are read by Pillow, which isn't installed", hint="pip install pillow"
        ) from error
    if not Path(file).is_file():
        raise FileFormatError(f"no file {file}")
    try:
        with Image.open(file) as opened:
            turned = ImageOps.exif_transpose(opened).convert("L" if grey else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise FileFormatError(f"{file} can't be read as an image: {first_line(error)}") from error
    return ImageOps.fit(turned, size, Image.Resampling.BICUBIC)


def _by_channel(name: str, given: Any, channels: int) -> Tensor:
    found = torch.as_tensor(0.5 if given is None else given, dtype=torch.float64).flatten()
    if len(found) not in (1, channels):
        raise UsageError(f"--{name} has {len(found)} values for {channels} channels")
    return found.expand(channels)[:, None, None]


def with_text(loaded: Loaded, text: str, folder: str | None) -> Given:
    """Put a text in place of the token ids among the example inputs.

    Args:
        loaded: The model, with an example input of integers ``[batch, length]``.
        text: The text.
        folder: Of the tokenizer, see `find_tokenizer`.

    Raises:
        UsageError: There is no tokenizer; the model takes no token ids, or further inputs that a
            text doesn't give; the text is empty.
    """
    place, example = _first(loaded, _is_ids, "token ids: an integer input [batch, length]")
    tokenizer = find_tokenizer(loaded, folder)
    encoding = _encoded(tokenizer, text)
    ids = torch.tensor([encoding["input_ids"]], dtype=example.dtype, device=example.device)
    if not ids.numel():
        raise UsageError("--text gives no tokens")
    found = {place: ids}
    for other, name, value in _leaves(loaded):
        if other == place or value is None:
            continue
        if name in encoding:
            found[other] = torch.tensor([encoding[name]], dtype=value.dtype, device=value.device)
        elif value.shape == example.shape and name in _MASKS:
            found[other] = torch.ones_like(ids, dtype=value.dtype)
        elif value.ndim and value.shape[0] == example.shape[0]:
            raise UsageError(
                f"a text gives no value for the model's input {name!r}",
                hint="let the factory return a model that needs token ids alone",
            )
    named = [_token(tokenizer, i) for i in encoding["input_ids"]]
    return Given(_with(loaded, found), None, [named], lambda i: _token(tokenizer, i))


def find_tokenizer(loaded: Loaded, folder: str | None) -> Any:
    """The tokenizer for a model.

    Args:
        loaded: The model; one that it has as ``tokenizer`` is taken.
        folder: A folder of a pretrained tokenizer, or a ``tokenizer.json``; nothing is downloaded.

    Raises:
        UsageError: There is none.
        FileFormatError: The folder holds none that can be read.
    """
    if folder is None:
        found = getattr(loaded.model, "tokenizer", None)
        if callable(found) or hasattr(found, "encode"):
            return found
        raise UsageError(
            "--text needs a tokenizer",
            hint="give --tokenizer FOLDER, or let the factory's model have one as .tokenizer",
        )
    path = Path(folder)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if path.is_dir() and _installed("transformers"):
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(file))
    except ImportError as error:
        raise UnsupportedError(
            "tokenizers are read by transformers or tokenizers, neither of which is installed",
            hint="pip install tokenizers",
        ) from error
    except Exception as error:  # these libraries raise bare Exceptions
        raise FileFormatError(f"{folder} holds no tokenizer: {first_line(error)}") from error


def _installed(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def _encoded(tokenizer: Any, text: str) -> dict[str, list[int]]:
    made: Any = tokenizer(text) if callable(tokenizer) else tokenizer.encode(text)
    if isinstance(made, Mapping):
        return {str(name): _plain(value) for name, value in made.items()}
    if hasattr(made, "ids"):
        return {"input_ids": _plain(made.ids), "token_type_ids": _plain(made.type_ids)}
    return {"input_ids": _plain(made)}


def _plain(ids: Any) -> list[int]:
    found = ids.tolist() if hasattr(ids, "tolist") else list(ids)
    return [int(i) for i in (found[0] if found and isinstance(found[0], list) else found)]


def _token(tokenizer: Any, index: int) -> str:
    for method in ("convert_ids_to_tokens", "id_to_token"):
        if hasattr(tokenizer, method):
            return str(getattr(tokenizer, method)(index))
    return str(index)


def _is_image(value: Tensor) -> bool:
    return value.is_floating_point() and value.ndim == 4 and value.shape[1] in (1, 3)


def _is_ids(value: Tensor) -> bool:
    return value.dtype in (torch.int64, torch.int32) and value.ndim == 2


def _leaves(loaded: Loaded) -> list[tuple[int | str, str, Any]]:
    """Place, name and value of each input; the value None where it is no tensor."""
    try:
        names = list(inspect.signature(loaded.model.forward).parameters)
    except (TypeError, ValueError):
        names = []
    padded = [*names, *[""] * len(loaded.args)]
    given = [(i, padded[i], v) for i, v in enumerate(loaded.args)]
    return [
        (place, name, value if isinstance(value, Tensor) else None)
        for place, name, value in [*given, *((k, k, v) for k, v in loaded.kwargs.items())]
    ]


def _first(loaded: Loaded, fits: Callable[[Tensor], bool], what: str) -> tuple[int | str, Tensor]:
    for place, _, value in _leaves(loaded):
        if value is not None and fits(value):
            return place, value
    raise UsageError(
        f"none of the example inputs is {what}",
        hint="let the factory return (model, args) with an example of it",
    )


def _with(loaded: Loaded, found: Mapping[int | str, Tensor]) -> Loaded:
    args = tuple(found.get(i, value) for i, value in enumerate(loaded.args))
    kwargs = {name: found.get(name, value) for name, value in loaded.kwargs.items()}
    return dataclasses.replace(loaded, args=args, kwargs=kwargs)

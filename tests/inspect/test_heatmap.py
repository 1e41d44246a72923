"""Heat maps and strips: colours that everybody tells apart, PNGs that others read, escaped text."""

from __future__ import annotations

import dataclasses
import io
import itertools
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import graphopt
from graphopt.errors import NonFiniteError, UsageError
from graphopt.inspect.relevance import (
    colours,
    describe,
    grid,
    heatmap,
    image_figure,
    png,
    scale_of,
    token_figure,
    token_html,
    token_text,
)
from graphopt.inspect.relevance.colours import luminance, readable_on
from graphopt.inspect.relevance.images import as_photo

# What people with a colour vision deficiency see: linear RGB -> linear RGB, for total protanopia,
# deuteranopia and tritanopia (Machado, Oliveira, Fernandes 2009, table 1).
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
         [-0.003882, -0.048116, 1.051998]]
    ),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
         [-0.011820, 0.042940, 0.968881]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
         [0.004733, 0.691367, 0.303900]]
    ),
}  # fmt: skip


def lab(colour: NDArray[np.uint8], seen: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* (D65) of a colour as somebody sees it."""
    share = colour.astype(float) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    linear = np.clip(seen @ linear, 0, 1)
    xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    ) @ linear / np.array([0.95047, 1.0, 1.08883])  # fmt: skip
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("kind", DEFICIENCIES)
def test_for_and_against_differ_for_everybody(kind: str) -> None:
    seen = DEFICIENCIES[kind]
    for size in (0.25, 0.5, 0.75, 1.0):
        far = np.linalg.norm(lab(colours(size), seen) - lab(colours(-size), seen))
        assert far > 20, (size, far)  # 2.3 is just noticed


def test_zero_is_white_and_both_sides_darken_alike() -> None:
    assert colours(0.0).tolist() == [255, 255, 255]
    steps = np.linspace(0, 1, 41)
    for sign in (1, -1):
        light = [lab(colours(sign * s), np.eye(3))[0] for s in steps]
        assert all(a > b for a, b in itertools.pairwise(light))
    for s in steps:
        pair = [lab(colours(sign * s), np.eye(3))[0] for sign in (1, -1)]
        assert abs(pair[0] - pair[1]) < 10, (s, pair)


def test_text_on_any_colour_can_be_read() -> None:
    for value in np.linspace(-1, 1, 101):
        ink = 0.0 if readable_on(value) == "#000000" else 1.0
        lights = sorted((luminance(colours(value)), ink))
        assert (lights[1] + 0.05) / (lights[0] + 0.05) >= 4.5  # WCAG 2.2, AA


def test_one_far_larger_pixel_does_not_make_the_rest_pale() -> None:
    values = torch.ones(100, 100)
    values[0, 0] = 1e6
    assert scale_of(values) == 1.0
    assert (heatmap(values) == colours(1.0)).all()
    # Where nearly all is zero, the scale is that of the others.
    lone = torch.zeros(100, 100)
    lone[3, 4] = -2.0
    assert heatmap(lone)[3, 4].tolist() == colours(-1.0).tolist()
    assert scale_of(torch.zeros(3)) == 1.0


def test_channels_are_summed_and_signs_kept() -> None:
    values = torch.zeros(3, 8, 8)
    values[0, 2, 3], values[1, 2, 3], values[2, 5, 5] = 3.0, -1.0, -2.0
    picture = heatmap(values, scale=2.0)
    assert picture.shape == (8, 8, 3)
    assert picture[2, 3].tolist() == colours(1.0).tolist()
    assert picture[5, 5].tolist() == colours(-1.0).tolist()
    assert picture[0, 0].tolist() == [255, 255, 255]


def test_over_a_photo_only_what_is_relevant_has_a_colour() -> None:
    values = torch.zeros(8, 8)
    values[1, 1], values[6, 6] = 1.0, -1.0
    photo = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    picture = heatmap(values, photo, alpha=1.0).astype(int)
    assert picture[1, 1].tolist() == colours(1.0).tolist()
    assert picture[6, 6].tolist() == colours(-1.0).tolist()
    values[1, 1] = values[6, 6] = 0
    grey = heatmap(values, photo)
    assert (grey == grey[..., :1]).all()
    bright = np.argsort(photo.permute(1, 2, 0).numpy() @ np.array([0.299, 0.587, 0.114]), None)
    shades = grey[..., 0].ravel()[bright].astype(int)
    assert (np.diff(shades) >= 0).all()


def test_another_reader_sees_the_same_pixels() -> None:
    picture = colours(np.random.default_rng(0).uniform(-1, 1, (13, 29)))
    with Image.open(io.BytesIO(png(picture))) as read:
        read.load()
        assert read.mode == "RGB"
        assert (np.asarray(read) == picture).all()


def test_a_grid_holds_every_picture_once() -> None:
    pictures = [np.full((4, 6, 3), 10 * (i + 1), np.uint8) for i in range(5)]
    sheet = grid(pictures, columns=3, gap=2)
    assert sheet.shape == (2 * 4 + 2, 3 * 6 + 2 * 2, 3)
    for i in range(5):
        assert (sheet == 10 * (i + 1)).all(-1).sum() == 24
    assert (sheet[:4, 8:14] == 20).all()
    assert grid(pictures[:1]).shape == (4, 6, 3)


@pytest.mark.parametrize("tensor", [torch.zeros(2, 3, 4, 4), torch.zeros(5), torch.zeros(0, 4)])
def test_what_is_no_image_is_refused(tensor: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        heatmap(tensor)


def test_bad_input_is_refused() -> None:
    with pytest.raises(NonFiniteError):
        heatmap(torch.full((4, 4), float("nan")))
    for options in ({"alpha": 2.0}, {"percentile": 0.0}):
        with pytest.raises(UsageError):
            heatmap(torch.ones(4, 4), **options)
    with pytest.raises(UsageError, match="pixels"):
        heatmap(torch.ones(4, 4), torch.rand(3, 5, 5))
    with pytest.raises(UsageError, match="one value a token"):
        token_html(["a", "b"], torch.ones(3))
    with pytest.raises(UsageError):
        grid([])


class Spans(HTMLParser):
    """The texts and styles of the tokens of a strip, as a browser reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.tokens: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if dict(attrs).get("class") == "token":
            self.tokens.append("")

    def handle_data(self, data: str) -> None:
        if self.tokens and data != "\u200b":
            self.tokens[-1] += data


def test_tokens_are_escaped_and_stay_as_they_are() -> None:
    tokens = ["<script>alert(1)</script>", '"><img src=x>', "&amp;", "\u0120hello", "a\x00b", ""]
    read = Spans()
    read.feed(token_html(tokens, torch.arange(6.0)))
    assert set(read.tags) == {"p", "span"}
    assert read.tokens == [*tokens[:3], " hello", "a\ufffdb", "\u2423"]


def test_the_strongest_token_has_the_strongest_colour() -> None:
    text = token_html(["a", "b", "c"], torch.tensor([0.0, -4.0, 2.0]))
    end = "#" + "".join(f"{c:02x}" for c in colours(-1.0).tolist())
    half = "#" + "".join(f"{c:02x}" for c in colours(0.5).tolist())
    assert text.index("#ffffff") < text.index(end) < text.index(half)


def test_a_terminal_reads_no_markup_in_tokens() -> None:
    text = token_text(["[bold]", "[/]", "x"], torch.tensor([1.0, -1.0, 0.0]))
    assert text.plain == "[bold] [/] x "
    assert len(text.spans) == 3


def test_figures_hold_what_was_given_and_leave_pyplot_alone() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    figure = image_figure(torch.randn(2, 3, 8, 8), torch.rand(2, 3, 8, 8), titles=["a", "b"])
    assert len(figure.axes) == 2 * 2 + 2  # photos and heat maps, and a colour bar each
    bars = token_figure(["$x$", "b"], torch.tensor([1.0, -2.0]))
    assert [p.get_height() for p in bars.axes[0].patches] == [1.0, -2.0]  # type: ignore[attr-defined]
    for each in (figure, bars):
        each.savefig(io.BytesIO(), format="png")
    assert plt.get_fignums() == before


def test_a_photo_of_half_precision_is_that_photo() -> None:
    image = torch.rand(3, 5, 4).bfloat16()
    np.testing.assert_array_equal(as_photo(image), as_photo(image.float()))


@dataclasses.dataclass
class Scores:
    """What a model may return."""

    logits: torch.Tensor
    mean: torch.Tensor


class OfBytes(torch.nn.Module):
    """A model of pixels as they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> Scores:
        found = self.layer(x.to(self.layer.weight.dtype) / 255)
        return Scores(found.amax((2, 3)), found.mean())


def test_pixels_of_bytes_are_an_image_and_a_dataclass_has_scores() -> None:
    pixels = torch.randint(0, 256, (2, 3, 6, 5), dtype=torch.uint8)
    explained = graphopt.explain(OfBytes(), (pixels,))
    view = describe(explained, (pixels,))
    assert describe(explained, pixels).samples[0].ledger == view.samples[0].ledger
    for sample, photo in zip(view.samples, pixels, strict=True):
        (found,) = sample.inputs
        assert found.kind == "image"
        np.testing.assert_array_equal(found.photo, photo.permute(1, 2, 0).numpy())
        assert len(sample.classes) == 4

"""Images whose class is one glyph on a textured background with distractors, and a CNN for them.

Which pixels matter is known: those of the glyph's box. Needs torch alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE, BOX = 40, 8
CLASSES = 6
_DISTRACTORS = 3
# Eight by eight, strokes two pixels wide.
_GLYPHS = (
    "######## ######## ...##... ...##... ...##... ...##... ...##... ...##...",  # T
    "##...... ##...... ##...... ##...... ##...... ##...... ######## ########",  # L
    "##....## ###..### .###.##. ..####.. ..####.. .##.###. ###..### ##....##",  # X
    "...##... ...##... ...##... ######## ######## ...##... ...##... ...##...",  # +
    "..####.. .##..##. ##....## ##....## ##....## ##....## .##..##. ..####..",  # O
    "######## ......## .....##. ...##... ..##.... .##..... ##...... ########",  # Z
)


def glyphs() -> Tensor:
    """The glyphs, ``(CLASSES, BOX, BOX)``, 1 for ink."""
    rows = [[[float(c == "#") for c in line] for line in text.split()] for text in _GLYPHS]
    return torch.tensor(rows)


def images(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw images.

    Distractors are glyphs of any class with their pixels shuffled, so that ink alone tells nothing,
    at places that don't overlap with the glyph.

    Returns:
        Images ``(count, 3, SIDE, SIDE)``, classes ``(count,)``, and masks ``(count, SIDE, SIDE)``,
        bool, of the glyph's box.
    """
    generator = torch.Generator().manual_seed(seed)
    shapes = glyphs()
    classes = torch.randint(CLASSES, (count,), generator=generator)
    pixels = _texture(count, generator)
    masks = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for row in range(count):
        places = _places(1 + _DISTRACTORS, generator)
        for index, (top, left) in enumerate(places):
            box = (slice(top, top + BOX), slice(left, left + BOX))
            ink = shapes[classes[row]]
            if index:
                other = shapes[int(torch.randint(CLASSES, (), generator=generator))].flatten()
                ink = other[torch.randperm(BOX * BOX, generator=generator)].reshape(BOX, BOX)
            color = 0.8 + 0.6 * torch.rand(3, 1, 1, generator=generator)
            pixels[row][:, box[0], box[1]] += color * ink
            if not index:
                masks[row][box] = True
    return pixels, classes, masks


def _texture(count: int, generator: torch.Generator) -> Tensor:
    """Noise on three scales."""
    found = torch.zeros(count, 3, SIDE, SIDE)
    for side, strength in ((5, 0.3), (10, 0.2), (SIDE, 0.15)):
        noise = torch.randn(count, 3, side, side, generator=generator)
        found += strength * F.interpolate(noise, (SIDE, SIDE), mode="bilinear")
    return found


def _places(count: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """Corners of boxes that don't overlap, inside the image."""
    found: list[tuple[int, int]] = []
    while len(found) < count:
        top, left = torch.randint(SIDE - BOX + 1, (2,), generator=generator).tolist()
        if all(abs(top - a) >= BOX or abs(left - b) >= BOX for a, b in found):
            found.append((top, left))
    return found


def network() -> nn.Sequential:
    """Five convolutions with BatchNorm and ReLU, two max poolings, a mean over places, a layer."""
    layers: list[nn.Module] = []
    c_in = 3
    for width, pooled in ((16, False), (16, True), (32, False), (32, True), (64, False)):
        layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if pooled else []
        c_in = width
    head = nn.Linear(c_in, CLASSES)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def trained(seed: int = 0, count: int = 4000, epochs: int = 6, batch: int = 64) -> nn.Module:
    """A trained network, in eval mode."""
    pixels, classes, _ = images(count, seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = network()
        generator = torch.Generator().manual_seed(seed)
        steps = epochs * (count // batch)
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, steps)
        for _ in range(epochs):
            for rows in torch.randperm(count, generator=generator).split(batch):
                if len(rows) == batch:
                    loss = F.cross_entropy(net(pixels[rows]), classes[rows])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, seed: int = 1, count: int = 2000) -> float:
    """Share of fresh images that are read rightly."""
    pixels, classes, _ = images(count, seed)
    found = torch.cat([net(part).argmax(1) for part in pixels.split(250)])
    return float((found == classes).double().mean())

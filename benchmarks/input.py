"""How many images a second a loader brings to the device, beside timm's own loader with its prefetcher.

python benchmarks/input.py [--quick] [--device cuda] [--workers 1 8 16] [--images 2048]
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from timm.data import create_dataset, create_loader

from probe_kd.data.batches import Batches
from probe_kd.data.loading import DataOptions, loader, open_datasets
from probe_kd.engine.spec import InputSpec

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def photographs(folder: Path, images: int) -> None:
    """JPEGs of 500x375 in two classes, as large as a photograph's: a gradient with noise on it.

    Those to validate are upside down: a recipe refuses copies of the training images.
    """
    noise = np.random.default_rng(0).normal(0, 12, (375, 500, 3))
    pixels = np.clip(np.linspace(0, 255, 500)[None, :, None] + noise, 0, 255).astype("uint8")
    for split, count, seen in (("train", images, pixels), ("validation", 2, pixels[::-1])):
        for index in range(count):
            place = folder / split / "ab"[index % 2]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.roll(seen, index, 1)).save(place / f"{index}.jpg", quality=88)


def ours(folder: Path, size: int, batch: int, workers: int, accelerator: Accelerator) -> Batches:
    options = DataOptions(root=str(folder), input_size=(3, size, size), batch_size=batch, workers=workers)
    given = InputSpec((3, size, size), MEAN, STD)
    return loader(open_datasets(options).train, options, given, training=True).prepare(accelerator)


def timms(folder: Path, size: int, batch: int, workers: int, accelerator: Accelerator) -> Iterable[Any]:
    loader_: Iterable[Any] = create_loader(
        create_dataset("", root=str(folder), split="train", is_training=True),
        input_size=(3, size, size),
        batch_size=batch,
        is_training=True,
        color_jitter=0.4,
        interpolation="bicubic",
        mean=MEAN,
        std=STD,
        num_workers=workers,
        use_prefetcher=True,
        device=accelerator.device,
    )
    return loader_


def epoch(batches: Iterable[Any]) -> measure.Arm:
    def read() -> None:
        for images, *_ in batches:
            assert images.dtype == torch.float32

    return read


def row(folder: Path, size: int, batch: int, workers: int, rounds: int, device: str) -> tuple[object, ...]:
    accelerator = Accelerator(cpu=device == "cpu")
    arms = {
        "timm": epoch(timms(folder, size, batch, workers, accelerator)),
        "probe-kd": epoch(ours(folder, size, batch, workers, accelerator)),
    }
    samples = measure.interleaved(arms, rounds, warmup=1, device=device)
    images = len(list((folder / "train").glob("*/*"))) // batch * batch
    each = [f"{1000 * images / samples.milliseconds(arm):.0f}" for arm in arms]
    return workers, *each, samples.ratio("timm", to="probe-kd")


def main() -> None:
    parser = measure.options(__doc__)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--workers", type=int, nargs="*", default=[1])
    wishes = parser.parse_args()
    size, batch, images = (32, 4, 8) if wishes.quick else (224, 128, wishes.images)
    rounds = wishes.rounds or (1 if wishes.quick else 5)
    with tempfile.TemporaryDirectory() as place:
        photographs(Path(place), images)
        rows = [row(Path(place), size, batch, workers, rounds, wishes.device) for workers in wishes.workers]
    print(
        measure.section(
            "Images a second, beside timm's loader",
            measure.command(),
            f"{images} JPEGs of 500x375, RandomResizedCrop to {size} pixels, flip, colour jitter of 0.4, {batch} a "
            f"batch, normalised on the device ({wishes.device}), over {rounds} rounds. Last: images a second of "
            "probe-kd as a multiple of timm's, round by round (median and quartiles).",
            ("workers", "timm", "probe-kd", "ratio"),
            rows,
        )
    )


if __name__ == "__main__":
    main()

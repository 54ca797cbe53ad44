"""`data: {memory: true}` gives what the loader gives without, and reads and transforms every image once."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset

from probe_kd.data import memory
from probe_kd.data.loading import DataOptions, Views, load, loader
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError

SPEC = InputSpec((3, 16, 16), 0.5, 0.25)
AUGMENTED: dict[str, Any] = {"input_size": [3, 16, 16], "batch_size": 4, "workers": 0, "reprob": 0.5}


class Images(Dataset[Any]):
    """Nine images of several sizes, and a file that counts how often they are read, in whatever process."""

    def __init__(self, log: Path) -> None:
        self.log = log
        sides = np.random.default_rng(0).integers(16, 40, (9, 2))
        self.images = [np.random.default_rng(0).integers(0, 255, (*side, 3), dtype=np.uint8) for side in sides]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        with self.log.open("a") as file:
            file.write(f"{index}\n")
        return Image.fromarray(self.images[index]), index % 3

    @property
    def reads(self) -> Counter[str]:
        return Counter(self.log.read_text().split())


def epochs(images: Dataset[Any], count: int, *, training: bool = True, **options: Any) -> list[list[torch.Tensor]]:
    """All that the loader gives in so many epochs, of one loader after another."""
    seen = []
    for age in range(count):
        batches = loader(images, DataOptions(**AUGMENTED | options), SPEC, training=training, seed=3)
        if isinstance(batches.sampler, Views):
            batches.sampler.begin(age)
            load(batches)
        seen.append([tensor for batch in batches for tensor in batch])
    return seen


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("views", "reads"), [(2, 2), (None, 1)])
def test_training_images_are_the_same_and_read_once_a_view(
    views: int | None, reads: int, workers: int, tmp_path: Path
) -> None:
    expected = epochs(Images(tmp_path / "plain"), 4, views=views)
    images = Images(tmp_path / "memory")
    seen = epochs(images, 4, views=views, workers=workers, memory=True)
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    sampled = 1  # to know the size of what is stored
    assert all(reads <= count <= reads + sampled for count in images.reads.values())
    assert len(images.reads) == 9


def test_test_images_are_the_same_and_read_once(tmp_path: Path) -> None:
    images = Images(tmp_path / "memory")
    expected = epochs(Images(tmp_path / "plain"), 2, training=False)
    part = Subset(images, range(9))
    torch.testing.assert_close(epochs(part, 2, training=False, memory=True), expected, rtol=0, atol=0)
    assert sorted(images.reads.values()) == [1] * 8 + [2]


def test_another_size_or_augmentation_has_images_of_its_own(tmp_path: Path) -> None:
    images = Images(tmp_path / "memory")
    for options in ({"hflip": 0.0}, {"hflip": 1.0}, {"no_aug": True}):
        plain = epochs(Images(tmp_path / "plain"), 2, views=1, **options)
        torch.testing.assert_close(epochs(images, 2, views=1, memory=True, **options), plain, rtol=0, atol=0)


@pytest.mark.parametrize("views", [2, None])
def test_more_than_there_is_room_for_is_refused(
    views: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available = 1000

    monkeypatch.setattr(memory.psutil, "virtual_memory", Full)
    with pytest.raises(DataError, match=r"`memory: true` takes .*e-05 GB for .*9 .*; leave it out, or take "):
        epochs(Images(tmp_path / "memory"), 1, views=views, memory=True)

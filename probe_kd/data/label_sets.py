"""The labels of images that have several, or none: stored by image, and given out as multi-hot vectors."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class LabelSets:
    """The class indices of every image: those of image i are `indices[starts[i] : starts[i + 1]]`."""

    starts: Int[np.ndarray, " images_and_one"]
    indices: Int[np.ndarray, " labels"]

    @classmethod
    def of(cls, sets: Iterable[Sequence[int]]) -> Self:
        rows = [np.unique(np.asarray(row, dtype=np.int64)) for row in sets]
        starts = np.cumsum([0, *map(len, rows)])
        return cls(starts, np.concatenate([np.zeros(0, np.int64), *rows]))

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, image: int) -> Int[np.ndarray, " labels"]:
        return self.indices[self.starts[image] : self.starts[image + 1]]

    def among(self, images: Iterable[int]) -> Self:
        return self.of([self[image].tolist() for image in images])

    def renumbered(self, table: Sequence[int]) -> Self:
        """The sets in which class index i became `table[i]`."""
        return type(self)(self.starts, np.asarray(table, dtype=np.int64)[self.indices])

    def image_of(self, label: int) -> int:
        """The image that has the label at this place of `indices`."""
        return int(np.searchsorted(self.starts, label, side="right")) - 1


class MultiHotImages(Dataset[Any]):
    """A data set whose targets are multi-hot vectors: 1 for every class that the image has."""

    def __init__(self, images: Dataset[Any], sets: LabelSets, num_classes: int) -> None:
        self.images, self.sets, self.num_classes = images, sets, num_classes

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, index: int) -> tuple[Image.Image, Float[np.ndarray, " classes"]]:
        target = np.zeros(self.num_classes, dtype=np.float32)
        target[self.sets[index]] = 1
        return self.images[index][0], target

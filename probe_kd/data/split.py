"""One split of a data set: its images, labels and class names."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset, Subset

from probe_kd.data.digests import printable
from probe_kd.data.images import FolderImages


@dataclass(frozen=True)
class Split:
    """One split: its images, the names of the classes by the index that the images have, and all labels if known.

    `sources` is what it reads, and `rows` are (part, first, end) of it, by which two splits of the same images are
    found; `empty` are classes without images.
    """

    key: str
    name: str
    images: Dataset[Any]
    names: tuple[str, ...]
    sources: frozenset[str]
    targets: Any = None
    empty: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rows: tuple[tuple[str, int, int], ...] = ()
    linked: bool = False  # whether links are among its files
    unfollowed: tuple[str, ...] = ()  # those of the notes that are of links to folders
    left_out: tuple[str, ...] = ()  # samples of shards that are no image with a class
    root: str = ""  # below which its files have the names by which they are known

    @property
    def label(self) -> str:
        return f"{self.key} {self.name!r}"

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def among(self, indices: Sequence[int]) -> Self:
        targets = None if self.targets is None else np.asarray(self.targets)[list(indices)]
        return replace(self, images=subset(self.images, indices), targets=targets)


def subset(images: Dataset[Any], indices: Sequence[int]) -> Subset[Any]:
    """Some of the images; of a subset, of what that is taken from."""
    if isinstance(images, Subset):
        return Subset(images.dataset, [images.indices[index] for index in indices])
    return Subset(images, list(indices))


def image_name(images: Dataset[Any], index: int) -> str:
    if isinstance(images, FolderImages):
        return printable(os.path.relpath(images.samples[index][0], images.root))
    return f"image {index}"


def quoted(names: Iterable[str], most: int = 5) -> str:
    """The first of many names, as a list in a sentence."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(repr(name) for name in shown[:most]) + more

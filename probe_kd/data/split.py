"""One split of a data set: its images, labels and class names."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from torch.utils.data import Dataset, Subset

from probe_kd.data.digests import printable
from probe_kd.data.images import FolderImages
from probe_kd.data.label_sets import LabelSets


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    `names` are the class names in the order of the indices in `targets`, and `targets` all labels, or None if unknown.
    `sources` is what the split reads, and `rows` are its ranges (part, start, stop) of a table; both reveal splits that
    share images. `empty` are classes without images.
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
    linked: bool = False  # whether some of its files are links
    unfollowed: tuple[str, ...] = ()  # the notes on links to folders
    left_out: tuple[str, ...] = ()  # samples of shards that are not an image with a class
    root: str = ""  # the folder that names of files are relative to
    labelled: bool = True  # without labels there are no `names` and no `targets`
    sets: LabelSets | None = None  # of images with several labels, which have no `targets`

    @property
    def label(self) -> str:
        return f"{self.key} {self.name!r}"

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def among(self, indices: Sequence[int]) -> Self:
        """The split with only these images."""
        targets = None if self.targets is None else np.asarray(self.targets)[list(indices)]
        sets = None if self.sets is None else self.sets.among(indices)
        return replace(self, images=subset(self.images, indices), targets=targets, sets=sets)

    @property
    def present(self) -> set[int] | None:
        """The class indices that some image has; None if not all labels are known."""
        if self.sets is not None:
            return set(self.sets.indices.tolist())
        return None if self.targets is None else set(np.asarray(self.targets).tolist())


def subset(images: Dataset[Any], indices: Sequence[int]) -> Subset[Any]:
    """Some of the images. A subset of a subset is taken from the whole data set."""
    if isinstance(images, Subset):
        return Subset(images.dataset, [images.indices[index] for index in indices])
    return Subset(images, list(indices))


def image_name(images: Dataset[Any], index: int) -> str:
    """The path of an image relative to its split's folder, or its number if it has no file."""
    if isinstance(images, FolderImages):
        return printable(os.path.relpath(images.samples[index][0], images.root))
    return f"image {index}"


def quoted(names: Iterable[str], most: int = 5) -> str:
    """The first `most` names in quotes, and the number of the others, for a sentence."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return ", ".join(repr(name) for name in all_names[:most]) + more

"""One class-to-index map for all splits, and checks of the labels."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from probe_kd.data.images import WITHOUT_LABELS, FolderImages
from probe_kd.data.split import Split, image_name, quoted
from probe_kd.errors import DataError, nearest


def renumbered(split: Split, names: Sequence[str], whose: str) -> Split:
    """The split with the class indices of `names`. Raises DataError for a class that is not in `names`."""
    if not names or tuple(split.names) == tuple(names):
        return split
    numbers = {name: number for number, name in enumerate(names)}
    used = range(len(split.names)) if split.present is None else sorted(split.present)
    unknown = [
        split.names[index] for index in used if 0 <= index < len(split.names) and split.names[index] not in numbers
    ]
    if unknown:
        near = nearest(unknown[0], names, 1)
        many = f"the classes {quoted(unknown)}" if len(unknown) > 1 else f"the class {unknown[0]!r}"
        raise DataError(
            f"{split.label} has {many}, which {whose} has not, so that no model can know it{near} (there are "
            f"{quoted(names)})",
            split.key,
        )
    table = [numbers.get(name, -1) for name in split.names]
    if table == list(range(len(table))):
        return replace(split, names=tuple(names))
    if split.sets is not None:
        return replace(split, names=tuple(names), sets=split.sets.renumbered(table))
    targets = None if split.targets is None else np.asarray(table)[split.targets]
    return replace(split, images=_renumbered_images(split.images, table), names=tuple(names), targets=targets)


def _renumbered_images(images: Dataset[Any], table: Sequence[int]) -> Dataset[Any]:
    if isinstance(images, FolderImages):
        return FolderImages(
            [(path, table[target]) for path, target in images.samples], images.mode, images.root, draft=images.draft
        )
    return _RenumberedImages(images, table)


class _RenumberedImages(Dataset[Any]):
    """A data set whose class index `i` becomes `table[i]`."""

    def __init__(self, images: Dataset[Any], table: Sequence[int]) -> None:
        self.images, self.table = images, table

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.images[index]
        return image, self.table[target]


def check_train(train: Split, names: Sequence[str], num_classes: int, *, may_lack: bool) -> None:
    """Raise DataError if the training images cannot train a classifier of these classes."""
    if train.empty and not may_lack:
        raise DataError(f"{train.label} has no images of {quoted(train.empty)}; put some in, or take the folder away")
    check_count(train)
    present = train.present
    if train.sets is None and (num_classes == 1 or (present is not None and len(present) == 1)):
        only = f" ({names[0]!r})" if len(names) == 1 else ""
        raise DataError(
            f"{train.label} has images of one class only{only}, and every model is right about these; a class is a "
            f"folder of images, and at least 2 are needed; or {WITHOUT_LABELS}",
            train.key,
        )
    missing = [] if present is None else [name for index, name in enumerate(names) if index not in present]
    if missing and not may_lack:
        raise DataError(
            f"{train.label} has no images of {quoted(missing)}; where that is meant, say so: "
            f"`num_classes: {num_classes}`"
        )


def check_count(train: Split) -> None:
    """Raise DataError for training images that are fewer than two."""
    if len(train) < 2:
        raise DataError(f"{train.label} has {len(train)} image; nothing can be learned from fewer than 2", train.key)


def check_labels(split: Split, num_classes: int) -> None:
    """Raise DataError if the split is empty or has a label outside of 0 to `num_classes - 1`."""
    if not len(split):
        raise DataError(f"{split.label} has no images", split.key)
    labels = split.targets if split.sets is None else split.sets.indices
    if labels is None:
        return
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        name = image_name(split.images, first if split.sets is None else split.sets.image_of(first))
        raise DataError(
            f"{split.label}: {len(wrong)} labels are none of the {num_classes} classes (0 to {num_classes - 1}); the "
            f"first is {int(labels[first])}, of {name}; set `num_classes`, or mend it",
            "num_classes",
        )


def notes_on_missing(split: Split, names: Sequence[str], num_classes: int) -> list[str]:
    """A note on the classes without images in this split; empty if there are none."""
    present = split.present
    if present is None:
        return []
    missing = [
        names[index] if index < len(names) else str(index) for index in range(num_classes) if index not in present
    ]
    note = f"{split.label} has no images of {len(missing)} of the {num_classes} classes: {quoted(missing)}"
    return [note] if missing else []

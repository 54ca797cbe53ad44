"""Splits that timm's `create_dataset` opens: torchvision's data sets and those of the Hugging Face hub."""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from probe_kd.data.images import decode, open_image
from probe_kd.data.label_sets import LabelSets
from probe_kd.data.names import IN_MEMORY, train_or_test
from probe_kd.data.options import DataOptions, Labels
from probe_kd.data.split import Split, quoted
from probe_kd.errors import DataError


def open_torchvision(options: DataOptions, key: str, split: str) -> Split:
    """Open a split of a torchvision data set. Raises DataError if it cannot be read."""
    name = options.dataset.lower().partition("/")[2]
    if not options.root:
        raise DataError(f"dataset {options.dataset!r} needs `root`, the folder that it lies in or is downloaded to")
    part = train_or_test(options, key, split) if name in IN_MEMORY else split
    inner: Any = _create_dataset(options, part)
    if hasattr(inner, "loader"):  # of files, which is torchvision's own
        inner.loader = _Loader(options.mode, options.draft)
    if hasattr(inner, "all_categories"):  # INaturalist's, which come as the disk lists them
        inner.index.sort()
    labelled = options.labels != "none"
    targets = getattr(inner, "targets", None) if labelled else None
    return Split(
        key=key,
        name=split,
        images=TorchvisionImages(inner, options.mode, labelled=labelled),
        names=_class_names(inner) if labelled else (),
        sources=frozenset({part}),
        targets=None if targets is None else np.asarray(targets),
        root=options.root,
        labelled=labelled,
    )


def _class_names(dataset: Any) -> tuple[str, ...]:
    """The class names of a torchvision data set in the order of their indices; empty if it has none."""
    order = getattr(dataset, "class_to_idx", None) or {}
    if sorted(order.values()) == list(range(len(order))):
        return tuple(map(str, sorted(order, key=order.__getitem__)))
    classes = getattr(dataset, "classes", None) or ()  # ImageNet's have several names each
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in classes)


def files_of(dataset: Any) -> list[tuple[str, str]]:
    """(path, class name) of the images of a torchvision data set; empty if it does not read files."""
    if hasattr(dataset, "all_categories"):
        labels = dataset.all_categories
        return [(os.path.join(dataset.root, labels[number], name), labels[number]) for number, name in dataset.index]
    classes = getattr(dataset, "classes", None) or ()
    label = {number: str(name) for number, name in enumerate(classes)}
    return [(path, label.get(target, str(target))) for path, target in getattr(dataset, "imgs", ())]


class TorchvisionImages(Dataset[Any]):
    """A torchvision data set with its images converted to one mode of PIL. MNIST's images are grey."""

    def __init__(self, images: Dataset[Any], mode: str, *, labelled: bool = True) -> None:
        self.images, self.mode, self.labelled = images, mode, labelled

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.images[index]
        return image.convert(self.mode), target if self.labelled else 0


@dataclass(frozen=True)
class _Loader:
    """The `loader` of torchvision's data sets of files. A class, because worker processes pickle it."""

    mode: str
    draft: int | None

    def __call__(self, path: str) -> Image.Image:
        return open_image(path, self.mode, self.draft)


def open_hub(options: DataOptions, key: str, split: str) -> Split:
    """Open a split of a data set of the Hugging Face hub. Raises DataError if it has no labels or cannot be read."""
    reader, name = _create_dataset(options, split).reader, f"{options.dataset} ({split})"
    images = HubImages(reader, options.mode, name, labels=options.labels, draft=options.draft)
    return Split(
        key=key,
        name=split,
        images=images,
        names=images.names,
        sources=frozenset({split}),
        targets=images.targets if options.labels == "class" else None,
        rows=_rows_of(images.reader.dataset, split),
        labelled=options.labels != "none",
        sets=images.sets,
    )


def _rows_of(dataset: Any, split: str) -> tuple[tuple[str, int, int], ...]:
    """The ranges (part, start, stop) of a split such as `train[:90%]`; empty if the data set tells no sizes."""
    parts = getattr(getattr(dataset, "info", None), "splits", None)
    if not parts:
        return ()
    from datasets import ReadInstruction

    lengths = {name: part.num_examples for name, part in parts.items()}
    ranges = ReadInstruction.from_spec(split).to_absolute(lengths)
    return tuple(
        (rows.splitname, rows.from_ or 0, lengths[rows.splitname] if rows.to is None else rows.to) for rows in ranges
    )


class HubImages(Dataset[Any]):
    """A data set of Hugging Face's `datasets`, opened by timm's reader.

    Its labels are numbers or names, with `labels="multilabel"` lists of these in a column `label` or `labels`. Images
    with several labels, or without, have the target 0 here.
    """

    def __init__(
        self, reader: Any, mode: str, name: str, *, labels: Labels = "class", draft: int | None = None
    ) -> None:
        self.reader, self.mode, self.draft, self.name, self.names = reader, mode, draft, name, tuple[str, ...]()
        self.sets = self._read_sets() if labels == "multilabel" else None
        self.targets = self._read_labels() if labels == "class" else np.zeros(len(reader.dataset), dtype=int)

    def _column(self, *keys: str) -> str:
        """The first of these columns that there is. Raises DataError if there is none."""
        names = self.reader.dataset.column_names
        key = next((key for key in keys if key in names), None)
        if key is None:
            raise DataError(
                f"{self.name} has no column {keys[0]!r} of labels; it has {quoted(names)}; `labels: none` needs none"
            )
        return key

    def _read_sets(self) -> LabelSets:
        """The labels of every image, where these are lists of class numbers or names."""
        key = self._column(self.reader.label_key, "labels")
        rows = list(self.reader.dataset[key])
        if not all(isinstance(row, list | tuple) for row in rows):
            raise DataError(f"the labels of {self.name} are no lists, as `labels: multilabel` needs them")
        kinds = {type(label) for row in rows for label in row}
        self.names = _names_of(self.reader.dataset, key)
        if kinds == {str} and not self.names:
            self.names = tuple(sorted({label for row in rows for label in row}))
        elif kinds - {int, str} or kinds == {int, str}:
            raise DataError(f"the labels of {self.name} are no class numbers: {_type_names(kinds)}")
        index = {label: number for number, label in enumerate(self.names)}
        return LabelSets.of([[index[label] if isinstance(label, str) else label for label in row] for row in rows])

    def _read_labels(self) -> Any:
        reader, name = self.reader, self.name
        labels = list(reader.dataset[self._column(reader.label_key)])
        kinds = {type(label) for label in labels}
        self.names = _names_by_index(reader.class_to_idx)
        if kinds == {str} and not self.names:
            self.names = tuple(sorted(set(labels)))
        elif not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
            hint = "; `labels: multilabel` takes lists" if kinds <= {list, tuple} else ""
            column = f"column {reader.label_key!r} has: {_type_names(kinds)}"
            raise DataError(f"the labels of {name} are no class numbers ({column}){hint}")
        index = {label: number for number, label in enumerate(self.names)}
        return np.array([index[label] if isinstance(label, str) else int(label) for label in labels], dtype=int)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # The reader would open any file, even a pipe, and wait for it.
        value = self.reader.dataset[index][self.reader.image_key] or {}
        if value.get("bytes"):
            image = decode(BytesIO(value["bytes"]), self.mode, f"image {index} of {self.name}", self.draft)
        elif value.get("path"):
            image = open_image(value["path"], self.mode, self.draft)
        else:
            raise DataError(f"image {index} of {self.name} cannot be read: there is none")
        return image, int(self.targets[index])

    def content(self, index: int) -> bytes | None:
        """The encoded bytes of an image, which do not depend on the decoder; None if the table has only a path."""
        return (self.reader.dataset[index][self.reader.image_key] or {}).get("bytes")


def _names_of(dataset: Any, key: str) -> tuple[str, ...]:
    """The class names of a column of lists; empty if they have no names."""
    feature: Any = (getattr(dataset, "features", None) or {}).get(key)
    while hasattr(feature, "feature"):
        feature = feature.feature
    return tuple(getattr(feature, "names", None) or ())


def _names_by_index(class_to_idx: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))


def _type_names(kinds: Iterable[type]) -> str:
    return ", ".join(sorted(kind.__name__ for kind in kinds))


def _create_dataset(options: DataOptions, split: str) -> Any:
    from timm.data import create_dataset

    try:
        return create_dataset(options.dataset, root=options.root, split=split, download=options.download)
    except Exception as refusal:  # timm, torchvision and the hub raise anything
        raise DataError(_why_unreadable(options, split, refusal)) from refusal


def _why_unreadable(options: DataOptions, split: str, refusal: Exception) -> str:
    text = " ".join(str(refusal).split()) or type(refusal).__name__
    if options.dataset.lower().startswith("torch/"):
        text += (
            " (without a network, put the files there as torchvision would)"
            if options.download
            else " (`download: true` fetches it)"
        )
    where = f" in {options.root!r}" if options.root else ""
    return f"cannot read the {split!r} split of dataset {options.dataset!r}{where}: {text}"

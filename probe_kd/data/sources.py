"""Open one split: one function for each source of images, and the contents of a split for `data.json`."""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from probe_kd.data.csv_files import csv_file, open_csv
from probe_kd.data.digests import (
    Contents,
    of_files,
    of_images,
    of_sets_of_files,
    of_sets_of_images,
    of_shards,
    of_unlabelled_files,
    printable,
)
from probe_kd.data.images import EXTENSIONS, WITHOUT_LABELS, FolderImages, scan_folder, scan_unlabelled
from probe_kd.data.label_sets import LabelSets
from probe_kd.data.names import EVALUATED, FOLDERS, TRAINED, is_csv, is_folder, train_or_test
from probe_kd.data.options import DataOptions
from probe_kd.data.shards import Shards, open_shards
from probe_kd.data.split import Split, quoted
from probe_kd.data.timm_datasets import TorchvisionImages, files_of, open_hub, open_torchvision
from probe_kd.errors import DataError, nearest

DEFAULT_TRAIN, DEFAULT_VAL = (DataOptions.model_fields[key].default for key in ("train_split", "val_split"))
DEFAULT_HOLDOUT = 0.1  # of a folder without labels and without images to measure on


def open_split(options: DataOptions, key: str, split: str) -> Split:
    """Open the split that `key` of the options names. Raises DataError if it is missing or cannot be read."""
    kind = options.dataset.lower().partition("/")[0]
    if options.labels == "multilabel" and kind != "hfds" and not is_csv(options):
        raise DataError("`labels: multilabel` is read from a CSV file (`csv/FILE`) or `hfds/`", "labels")
    if kind == "sklearn":
        return _open_digits(options, key, split)
    if kind == "wds":
        return _open_shards(options, key, split)
    if kind == "hfds":
        return open_hub(options, key, split)
    if is_csv(options):
        return open_csv(options, key, split)
    if is_folder(options):
        return _open_folder(options, key, split)
    return open_torchvision(options, key, split)


def _open_digits(options: DataOptions, key: str, split: str) -> Split:
    if options.num_classes not in (None, 10):
        raise DataError(f"num_classes {options.num_classes}: sklearn/digits has 10 classes", "num_classes")
    part = train_or_test(options, key, split)
    images, targets = _digits(part, options.mode)
    if options.labels == "none":
        return Split(key, split, DigitImages(images, np.zeros_like(targets)), (), frozenset({part}), labelled=False)
    names = tuple(map(str, range(10)))
    return Split(key, split, DigitImages(images, targets), names, frozenset({part}), targets)


@cache
def _digits(part: str, mode: str) -> tuple[list[Image.Image], Any]:
    pixels, targets = _load_digits(part)
    return [Image.fromarray((image * (255 / 16)).astype("uint8")).convert(mode) for image in pixels], targets


@cache
def _load_digits(part: str) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    # The split never depends on the seed of a run, so runs are compared on the same 360 images.
    split = train_test_split(pixels.reshape(-1, 8, 8), targets, test_size=0.2, random_state=0, stratify=targets)
    train_pixels, test_pixels, train_targets, test_targets = split
    return (train_pixels, train_targets) if part == "train" else (test_pixels, test_targets)


class DigitImages(Dataset[Any]):
    """The handwritten digits of scikit-learn (UCI): 8x8 grey images of the digits 0 to 9."""

    def __init__(self, images: Sequence[Image.Image], targets: Any) -> None:
        self.images, self.targets = images, targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], int(self.targets[index])


def _open_shards(options: DataOptions, key: str, split: str) -> Split:
    skip, labelled = options.on_error == "skip", options.labels != "none"
    images = open_shards(
        options.root,
        split,
        mode=options.mode,
        draft=options.draft,
        num_classes=options.num_classes,
        skip=skip,
        labelled=labelled,
    )
    images.read_labels()
    sources = frozenset(os.path.realpath(file) for file in images.files)
    left_out = tuple(map(printable, images.left_out))
    return Split(
        key=key,
        name=split,
        images=images,
        names=(),
        sources=sources,
        targets=images.targets if labelled else None,
        left_out=left_out,
        root=str(options.root),
        labelled=labelled,
    )


def _open_folder(options: DataOptions, key: str, split: str) -> Split:
    folder = _split_folder(options, key, split)
    outermost, labelled = options.dataset.lower().partition("/")[2] in FOLDERS, options.labels != "none"
    scan = scan_folder(folder, outermost=outermost) if labelled else scan_unlabelled(folder)
    names = tuple(scan.files)
    if not names:
        raise DataError(f"there are no images in {folder}; read are files that end in {' '.join(EXTENSIONS)}", key)
    samples = scan.samples({name: index for index, name in enumerate(names)}, by_path=labelled and not outermost)
    return Split(
        key=key,
        name=split,
        images=FolderImages(samples, options.mode, folder, draft=options.draft),
        names=names if labelled else (),
        sources=frozenset({os.path.realpath(folder)}),
        targets=np.array([target for _, target in samples]) if labelled else None,
        empty=tuple(scan.empty),
        notes=tuple(scan.notes),
        linked=scan.linked,
        unfollowed=tuple(scan.unfollowed),
        labelled=labelled,
    )


def with_default_splits(options: DataOptions) -> tuple[DataOptions, list[str]]:
    """The splits that are read of images without labels, where the folders or CSV files that are the default are none.

    Without a folder for training the whole folder is taken, and without images for validation a tenth is held out. The
    sentences say so.
    """
    root = options.root
    of_folder = is_folder(options) and bool(root) and os.path.isdir(str(root))
    if options.labels != "none" or not (of_folder or is_csv(options)):
        return options, []
    changes, notes = dict[str, Any](), []
    if of_folder and options.train_split == DEFAULT_TRAIN and not _existing_folder(str(root), DEFAULT_TRAIN):
        changes["train_split"] = "."
        notes.append(f"there is no folder {DEFAULT_TRAIN!r} in {root}: all images in it are training images")
    if options.val_split == DEFAULT_VAL and not _has_validation(options, of_folder=of_folder):
        changes["val_split"] = "none"
        if not options.holdout and "test_split" not in options.splits:
            changes["holdout"] = DEFAULT_HOLDOUT
            notes.append(
                f"there are no images {DEFAULT_VAL!r}, and no `holdout`: {DEFAULT_HOLDOUT:.0%} of the training images "
                "are held out to measure on"
            )
    return options.model_copy(update=changes), notes


def _has_validation(options: DataOptions, *, of_folder: bool) -> bool:
    if of_folder:
        return bool(_existing_folder(str(options.root), DEFAULT_VAL))
    try:
        csv_file(options, "val_split", DEFAULT_VAL)
    except DataError:
        return False
    return True


def _existing_folder(root: str, split: str) -> str:
    """The folder of a split in `root`, by the split's name or one that timm treats as the same; empty if none is."""
    synonyms = TRAINED if split in TRAINED else EVALUATED if split in EVALUATED else ()
    for name in (split, *synonyms):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name) if name != "." else root
    return ""


def _split_folder(options: DataOptions, key: str, split: str) -> str:
    """The folder of a split in `root`, by the split's name or one that timm treats as the same."""
    root = options.root
    if not (root and Path(root).is_dir()):
        raise DataError(
            f"there is no folder {root!r} to read images from; set `root`, or name a `dataset` (where a run's "
            "images have moved, `eval --root DIR`)"
        )
    if folder := _existing_folder(root, split):
        return folder
    subfolders = sorted(  # a link to itself is no folder, and `entry.is_dir` raises for it
        entry.name for entry in os.scandir(root) if os.path.isdir(entry.path) and not entry.name.startswith(".")
    )
    listing = f"there are {quoted(subfolders)}{nearest(split, subfolders)}" if subfolders else "it holds no folders"
    if key == "train_split":
        advice = (
            "name one of them; where these are the classes, give `train_split: .`, with `val_split: none` and "
            "`holdout: 0.1`"
        )
        if any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(root)):
            advice += f"; there are images in {root!r} itself: {WITHOUT_LABELS}"
    else:
        advice = f"name one of them as `{key}`, or hold training images out: `val_split: none` with `holdout: 0.1`"
    raise DataError(f"there is no folder {split!r} in {root!r} for `{key}`: {listing}; {advice}", key)


def contents_of(split: Split) -> Contents:
    """A digest of the images and classes of a split, as its source stores them."""
    images, names = split.images, split.names
    if split.sets is not None:
        return _contents_of_sets(split, split.sets)
    if isinstance(images, FolderImages):
        if not split.labelled:
            return of_unlabelled_files([path for path, _ in images.samples], images.root)
        return of_files([(path, names[target]) for path, target in images.samples], images.root)
    if isinstance(images, Shards):
        return of_shards(images, split.root, split.targets)
    files = files_of(images.images) if isinstance(images, TorchvisionImages) else []
    if files:
        return of_files(files, split.root) if split.labelled else of_unlabelled_files([*dict(files)], split.root)
    targets = [] if split.targets is None else np.asarray(split.targets).tolist()
    return of_images(images, [names[target] if 0 <= target < len(names) else str(target) for target in targets])


def _contents_of_sets(split: Split, sets: LabelSets) -> Contents:
    images, names = split.images, split.names
    labels = [
        [names[index] if 0 <= index < len(names) else str(index) for index in sets[image]] for image in range(len(sets))
    ]
    if isinstance(images, FolderImages):
        return of_sets_of_files([path for path, _ in images.samples], labels, images.root)
    return of_sets_of_images(images, labels)


def in_memory(images: Dataset[Any]) -> bool:
    """Whether the images are decoded already, so that none can fail to be read."""
    return isinstance(images, DigitImages) or (
        isinstance(images, TorchvisionImages) and not hasattr(images.images, "loader")
    )

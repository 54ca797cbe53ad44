"""Datasets: all splits of a recipe opened, checked and divided into training and held-out images."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Subset

from probe_kd.data.classes import check_count, check_labels, check_train, notes_on_missing, renumbered
from probe_kd.data.label_sets import MultiHotImages
from probe_kd.data.names import OF_TWO_PARTS, check_name, train_or_test
from probe_kd.data.options import DataOptions, Labels
from probe_kd.data.overlap import overlap, with_note_of_copies
from probe_kd.data.record import DataRecord
from probe_kd.data.shards import Shards
from probe_kd.data.sources import contents_of, in_memory, open_split, with_default_splits
from probe_kd.data.split import Split, image_name, quoted
from probe_kd.errors import DataError


@dataclass(frozen=True)
class Datasets:
    """The images of a recipe, as PIL images with a class index, and the number of classes.

    With several labels an image (`labels: multilabel`), the label is a multi-hot vector of floats. Without labels
    (`labels: none`), every image has index 0, and there are no classes.
    `test` gives the final figures, and `val` the curves, if these come from other images. `held_out` are the training
    images that no model trains on. `classes` are the class names in order, if the data set has names. `measured_on`
    says in words which images the figures come from, and `notes` what else a user should know. `skipped` names the
    images of each split that could not be read and are left out.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    labels: Labels = "class"
    sampler: str | None = None
    held_out: Dataset[Any] | None = None
    val: Dataset[Any] | None = None
    classes: tuple[str, ...] = ()
    measured_on: str = ""
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: tuple[Split, ...] = field(
        default=(), repr=False, compare=False
    )  # as opened, before renumbering and division
    train_targets: Any = field(
        default=None, repr=False, compare=False
    )  # all labels of `train`; None if not all are known
    read_from: Mapping[str, str] = field(default_factory=dict)  # the key of the split that each part comes from

    @property
    def to_choose_by(self) -> Dataset[Any] | None:
        """Images that neither train a model nor give its final figure; None if there are none."""
        return self.held_out if self.held_out is not None else self.val

    @property
    def train_counts(self) -> list[int] | None:
        """The number of training images of each class; None if not all labels are known, or images have several."""
        if self.train_targets is None:
            return None
        counts: list[int] = np.bincount(self.train_targets, minlength=self.num_classes).tolist()
        return counts

    @property
    def balanced(self) -> Any:
        """The classes of the training images, where `sampler: balanced` draws by them; else None."""
        return self.train_targets if self.sampler == "balanced" else None

    @property
    def record(self) -> DataRecord:
        counted = {"train": self.train, "val": self.val, "test": self.test, "held_out": self.held_out}
        images = {name: len(part) for name, part in counted.items() if part is not None}  # type: ignore[arg-type]
        contents = {split.key: contents_of(split) for split in self.whole}
        return DataRecord(self.classes, self.num_classes, images, dict(self.skipped), contents)

    def other_than(self, record: DataRecord | None, part: str) -> tuple[str, ...]:
        """A remark if a part (`test`, `val`, `train` or `held_out`) has other images than it had in a run.

        Raises DataError if the training images changed and a part of them is held out: the run may have trained on it.
        """
        difference = self.difference(record, part)
        if record is None or not difference:
            return ()
        if self.held_out is not None and self._key_of(part) == "train_split":
            raise DataError(
                f"the training images are not those of the run: {difference}. Which images are held out follows from "
                "all of them, so that those of now may have been trained on; put the images back as they were, or name "
                "a copy that is (--root DIR), or measure another split, where the run has one (--split)",
                "train_split",
            )
        counts = f" ({record.images[part]} images then)" if part in record.images else ""
        return (f"these are not the images of the run{counts}: {difference}",)

    def difference(self, record: DataRecord | None, part: str) -> str:
        """How the split of a part differs from that of a run; empty if it does not, or the run did not record it."""
        key = self._key_of(part)
        split = next((split for split in self.whole if split.key == key), None)
        earlier = record.contents.get(key) if record is not None else None
        change = earlier.difference(contents_of(split)) if split is not None and earlier is not None else ""
        return f"of {split.label}, {change}" if split is not None and change else ""

    def _key_of(self, part: str) -> str:
        return self.read_from.get(part, "train_split")


def open_datasets(options: DataOptions, record: DataRecord | None = None, *, fold: int = 0) -> Datasets:
    """Open all splits that the options name. Raises DataError if one is missing, or cannot be trained on or measured.

    The class indices are those of the training split, or those of `record`, which an earlier run stored. `fold` numbers
    disjoint choices of the images that `holdout` keeps out, as many as there are; a run has the first.
    """
    check_name(options.dataset)
    options, notes = with_default_splits(options)
    splits = _open_all(options)
    try:
        datasets = _checked(options, splits, record, fold)
        return replace(datasets, notes=(*notes, *datasets.notes))
    except DataError as refusal:  # what is missing may be behind a link that was not followed
        links = [note for split in splits for note in split.unfollowed]
        if not links:
            raise
        raise DataError(f"{refusal}; {'; '.join(links[:3])}", refusal.key) from None


def _checked(options: DataOptions, splits: list[Split], record: DataRecord | None, fold: int) -> Datasets:
    train, whole = splits[0], tuple(splits)
    names = record.classes if record is not None and record.classes else train.names
    if options.labels != "none":
        splits = [
            renumbered(split, names, whose="the run" if names is not train.names else train.label) for split in splits
        ]
    skipped: dict[str, tuple[str, ...]] = {}
    if options.on_error == "skip":
        for number, split in enumerate(splits):
            splits[number], left_out = _without_unreadable(split, record.skipped if record is not None else None)
            skipped |= {split.key: left_out} if left_out else {}
    num_classes = options.num_classes or len(names)
    if not num_classes and options.labels != "none":
        raise DataError(
            f"dataset {options.dataset!r} does not tell how many classes it has; set `num_classes`", "num_classes"
        )
    notes = [note for split in splits for note in split.notes]
    classless = {split.key for split in splits if split.left_out and split.labelled}
    notes += [
        f"{len(images)} images of {key} cannot be read{' or have no class' * (key in classless)} and are left out: "
        f"{quoted(images)}"
        for key, images in skipped.items()
    ]
    for split in splits:
        check_labels(split, num_classes)
        notes += notes_on_missing(split, names, num_classes)
    may_lack = options.num_classes is not None or record is not None
    _check_train(splits[0], names, num_classes, may_lack=may_lack)
    if options.sampler == "balanced" and splits[0].targets is None:
        raise DataError(
            f"`sampler: balanced` needs the classes of all images, which dataset {options.dataset!r} tells only when "
            "an image is read; leave it out, or weigh the classes: `cross_entropy` has `class_weights`",
            "sampler",
        )
    divided = _divided(options, splits, num_classes, names, notes, fold=fold)
    return replace(divided, classes=names, skipped=skipped, whole=whole, labels=options.labels, sampler=options.sampler)


def _check_train(train: Split, names: Sequence[str], num_classes: int, *, may_lack: bool) -> None:
    if train.labelled:
        check_train(train, names, num_classes, may_lack=may_lack)
    else:
        check_count(train)


def _open_all(options: DataOptions) -> list[Split]:
    split_names = options.splits
    if len(split_names) == 1 and not options.holdout:
        raise DataError(
            "there are no images to measure on: name them as `val_split`, or hold some of the training images out, as "
            "in `holdout: 0.1`",
            "val_split",
        )
    if options.dataset.lower() in OF_TWO_PARTS:
        for key, name in split_names.items():
            train_or_test(options, key, name)
    opened = [open_split(options, key, name) for key, name in split_names.items()]
    for number, split in enumerate(opened):
        for other in opened[:number]:
            if overlap(other, split):
                raise DataError(
                    f"{split.label} has images of {other.label}, and no figure of images that were used before means "
                    f"anything; name other images, or hold some out: `val_split: none` with `holdout: 0.1`",
                    split.key,
                )
    return [opened[0], *(with_note_of_copies(split, opened[0]) for split in opened[1:])]


def class_names(datasets: Datasets) -> list[str]:
    """The names of the classes in order; their indices if the data set has no names."""
    complete = len(datasets.classes) == datasets.num_classes
    return list(datasets.classes) if complete else [str(index) for index in range(datasets.num_classes)]


def _without_unreadable(split: Split, recorded: Mapping[str, Sequence[str]] | None) -> tuple[Split, tuple[str, ...]]:
    """The split without unreadable images, and their names: those that a run `recorded`, if given.

    Otherwise threads decode every image, because the images of a split must be known before any of them is used.
    """
    count = len(split)
    if recorded is not None:
        names = set(recorded.get(split.key, ()))
        unreadable = {index for index in range(count) if names and image_name(split.images, index) in names}
    elif in_memory(split.images):
        unreadable = set()
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            starts = range(0, count, 64)
            parts = threads.map(lambda start: _unreadable(split.images, range(start, min(start + 64, count))), starts)
            unreadable = {index for part in parts for index in part}
    if not unreadable:
        return split, split.left_out
    readable_indices = [index for index in range(count) if index not in unreadable]
    return split.among(readable_indices), (
        *split.left_out,
        *(image_name(split.images, index) for index in sorted(unreadable)),
    )


def _unreadable(images: Dataset[Any], indices: Iterable[int]) -> list[int]:
    return [index for index in indices if not _can_read(images, index)]


def _can_read(images: Dataset[Any], index: int) -> bool:
    try:
        images[index]
    except DataError:
        return False
    return True


def _divided(
    options: DataOptions,
    splits: Sequence[Split],
    num_classes: int,
    names: Sequence[str],
    notes: Sequence[str],
    *,
    fold: int,
) -> Datasets:
    """Divide the training images by `holdout` and `fraction`, and choose the images that give the figures."""
    train, *others = splits
    held_out: Split | None = None
    if options.holdout or options.fraction < 1:
        train, held_out, more_notes = _without_held_out(options, train, num_classes, names, fold=fold)
        notes = list(dict.fromkeys([*notes, *more_notes]))
    train, *others = (_with_vectors(split, num_classes) for split in (train, *others))
    held_out = held_out and _with_vectors(held_out, num_classes)
    measured_splits = [*([] if "val_split" in options.splits or held_out is None else [held_out]), *others]
    final, curves = measured_splits[-1], measured_splits[0]
    return Datasets(
        train=train.images,
        test=final.images,
        num_classes=num_classes,
        held_out=held_out.images if held_out else None,
        val=curves.images if curves is not final else None,
        measured_on=_measured_on(
            *(
                f"the held-out images ({len(split)})" if split is held_out else f"{split.label} ({len(split)} images)"
                for split in (curves, final)
            )
        ),
        notes=tuple(notes),
        train_targets=train.targets,
        read_from={"test": final.key, "val": curves.key},
    )


def _without_held_out(
    options: DataOptions, train: Split, num_classes: int, names: Sequence[str], *, fold: int
) -> tuple[Split, Split | None, list[str]]:
    """The images to train on, those held out of them, and notes on classes that are missing in either."""
    held_out_indices, train_indices = _division(options, train, fold)
    held_out = train.among(held_out_indices) if held_out_indices else None
    train = train.among(train_indices)
    _check_train(train, names, num_classes, may_lack=True)
    notes = [note.replace(train.label, "what is trained on") for note in notes_on_missing(train, names, num_classes)]
    if held_out is not None:
        missing = notes_on_missing(held_out, names, num_classes)
        notes += [note.replace(f"{held_out.label} has", "the held-out images have") for note in missing]
    return train, held_out, notes


def _with_vectors(split: Split, num_classes: int) -> Split:
    """The split with multi-hot vectors as labels, if its images have several."""
    if split.sets is None:
        return split
    return replace(split, images=MultiHotImages(split.images, split.sets, num_classes))


def _measured_on(curves: str, final: str) -> str:
    if curves != final:
        return f"curves are of {curves}, the final figures of {final}, which is measured once"
    if final.startswith("the held-out"):
        return f"curves and final figures are of {final}; there is no test figure (`test_split` gives one)"
    other = "`val_split` or `holdout` gives others for the curves"
    if final.startswith("val_split"):
        other = "`test_split` gives others for the final figures"
    return f"curves and final figures are both of {final}; {other}"


def _division(options: DataOptions, train: Split, fold: int) -> tuple[list[int], list[int]]:
    """Indices of the images that are held out, and of those that are trained on."""
    count = len(train)
    num_held_out = round(count * options.holdout)
    if options.holdout and not 0 < num_held_out < count:
        raise DataError(f"holdout {options.holdout} of {count} training images leaves none on one side", "holdout")
    num_train = round((count - num_held_out) * options.fraction)
    if not num_train:
        message = f"fraction {options.fraction} of {count - num_held_out} training images is less than one image"
        raise DataError(message, "fraction")
    # The division never depends on the seed of a run, so runs are compared on the same images.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    start = fold * num_held_out % count
    order = order[start:] + order[:start]
    parts = order[:num_held_out], order[num_held_out : num_held_out + num_train]
    whole = train.images.dataset if isinstance(train.images, Subset) else train.images
    if isinstance(whole, Shards):  # they are read from one end to the other
        parts = sorted(parts[0]), sorted(parts[1])
    return parts

"""Datasets: what the `data:` section of a recipe names, opened and checked, with one numbering of the classes."""

import filecmp
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from torch.utils.data import Dataset, Subset

from probe_kd.data.digests import Contents, of_files, of_images, of_shards, printable, spread
from probe_kd.data.images import EXTENSIONS, FolderImages, decode, open_image, scan_folder
from probe_kd.data.shards import Shards, open_shards
from probe_kd.errors import DataError, nearest
from probe_kd.files.atomic import whole_bytes
from probe_kd.files.run_folder import Manifest, changed, damaged

RECORD = "data.json"
_Side = Annotated[int, Field(ge=1, le=16384)]


def _in_order(given: tuple[float, float]) -> tuple[float, float]:
    least, most = given
    if not 0 < least <= most:
        expected = f"; did you mean [{most:g}, {least:g}]?" if 0 < most < least else ", both above 0"
        raise ValueError(f"[{least:g}, {most:g}]: expected [least, most]{expected}")
    return given


def _grey_or_colour(size: tuple[int, int, int]) -> tuple[int, int, int]:
    if size[0] not in (1, 3):
        raise ValueError(f"{size[0]} channels: images have 1 (grey) or 3 (colour); expected [channels, height, width]")
    return size


_Range = Annotated[tuple[float, float], AfterValidator(_in_order)]
InputSize = Annotated[tuple[Annotated[int, Field(ge=1)], _Side, _Side], AfterValidator(_grey_or_colour)]


def _none_as_word(value: Any) -> Any:
    """A recipe is written down without what is null, and `val_split` has another default."""
    return "none" if value is None else value


class DataOptions(BaseModel):
    """The `data:` section of a recipe. Names and meanings are those of timm's `create_dataset` and `create_transform`.

    `dataset` is `sklearn/digits`, or what timm's `create_dataset` reads: `torch/cifar100`, `torch/fashion_mnist`,
    `hfds/...`, a folder of folders (empty name), a folder of tar shards (`wds/NAME`); not streams (`tfds/`, `hfids/`).
    `val_split` is measured after every epoch, and may be `none`; `test_split` is measured once, when training is over.
    Where only one of the two is given it serves both; without both, the images of `holdout` do.
    `on_error: skip` leaves out images that cannot be read, which else end the run with their names.
    `input_size` is (channels, height, width). `mean` and `std` are the student's, where they differ from timm's config.
    `holdout` is the share of the training images that is kept from training, for choosing by (`keep: best`), and
    `fraction` the share of the others that is trained on: the same images whatever the seed of a run. `mixup`
    and `cutmix` mix two images, and their labels, before either model sees them (timm's `Mixup`). With `views` every
    image is seen in so many augmented views, in turn, instead of in a new one every epoch; a cache of the teacher then
    holds no more than these.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dataset: str = ""
    root: str | None = None
    train_split: str = "train"
    val_split: Annotated[str | None, BeforeValidator(_none_as_word)] = "validation"
    test_split: str | None = None
    on_error: Literal["raise", "skip"] = "raise"
    download: bool = False
    num_classes: int | None = Field(default=None, ge=1)
    input_size: InputSize
    batch_size: int = Field(default=128, ge=1)
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    crop_pct: float | None = Field(default=None, ge=0.1, le=1)
    no_aug: bool = False
    scale: _Range = (0.08, 1.0)
    ratio: _Range = (0.75, 4 / 3)
    hflip: float = Field(default=0.5, ge=0, le=1)
    vflip: float = Field(default=0.0, ge=0, le=1)
    color_jitter: float | None = Field(default=0.4, ge=0)
    aa: str | None = None
    reprob: float = Field(default=0.0, ge=0, le=1)
    views: int | None = Field(default=None, ge=1)
    holdout: float = Field(default=0.0, ge=0, lt=1)
    fraction: float = Field(default=1.0, gt=0, le=1)
    mixup: float = Field(default=0.0, ge=0)
    cutmix: float = Field(default=0.0, ge=0)
    mixup_prob: float = Field(default=1.0, ge=0, le=1)
    mixup_switch_prob: float = Field(default=0.5, ge=0, le=1)
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"

    @property
    def num_views(self) -> int | None:
        """How many different views of an image there are; None for a new one every epoch."""
        return 1 if self.no_aug else self.views

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def mode(self) -> str:
        """PIL's mode of the images, whatever that of their files is."""
        return "L" if self.input_size[0] == 1 else "RGB"

    @property
    def splits(self) -> dict[str, str]:
        """The splits that are read, by the key that names each."""
        given = {"train_split": self.train_split, "val_split": self.val_split, "test_split": self.test_split}
        return {key: split for key, split in given.items() if split is not None and split.lower() != "none"}

    @model_validator(mode="after")
    def _mixes_in_pairs(self) -> Self:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size {self.batch_size} is odd, and mixup and cutmix mix images in pairs")
        return self


@dataclass(frozen=True)
class Datasets:
    """The images of a recipe, as PIL images with a class index, and how many classes there are.

    `test` are the images of the final figure, and `val` those of the curves where these are others. `held_out` are the
    training images that are kept from training. `classes` are the names of the classes in their order, where the
    dataset has names. `measured_on` says in words which images the figures are of, `notes` what else a user should
    know, and `skipped` which images of each split could not be read and are left out.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    held_out: Dataset[Any] | None = None
    val: Dataset[Any] | None = None
    classes: tuple[str, ...] = ()
    measured_on: str = ""
    notes: tuple[str, ...] = ()
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    whole: "tuple[_Split, ...]" = field(default=(), repr=False, compare=False)  # as they were opened
    read_from: Mapping[str, str] = field(default_factory=dict)  # the key of the split that each part is of

    @property
    def to_choose_by(self) -> Dataset[Any] | None:
        """Images that neither train a model nor give its final figure; None where there are none."""
        return self.held_out if self.held_out is not None else self.val

    @property
    def record(self) -> "DataRecord":
        counted = {"train": self.train, "val": self.val, "test": self.test, "held_out": self.held_out}
        images = {name: len(part) for name, part in counted.items() if part is not None}  # type: ignore[arg-type]
        contents = {split.key: _contents_of(split) for split in self.whole}
        return DataRecord(self.classes, self.num_classes, images, dict(self.skipped), contents)

    def other_than(self, record: "DataRecord | None", part: str) -> tuple[str, ...]:
        """A remark where a part (`test`, `val`, `train` or `held_out`) has other images than it had in a run.

        Raises DataError where other training images are divided: these held-out images may have been trained on.
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

    def difference(self, record: "DataRecord | None", part: str) -> str:
        """How the split of a part differs from that of a run, as far as that has kept it; else empty."""
        key = self._key_of(part)
        split = next((split for split in self.whole if split.key == key), None)
        before = record.contents.get(key) if record is not None else None
        found = before.difference(_contents_of(split)) if split is not None and before is not None else ""
        return f"of {split.label}, {found}" if split is not None and found else ""

    def _key_of(self, part: str) -> str:
        return self.read_from.get(part, "train_split")


@dataclass(frozen=True)
class DataRecord:
    """What a run keeps of its data in `data.json`, to read them again by: above all, the order of the classes."""

    classes: tuple[str, ...]
    num_classes: int
    images: dict[str, int]
    skipped: dict[str, tuple[str, ...]]
    contents: dict[str, Contents] = field(default_factory=dict)  # by the key of the split; none in runs of before

    def write(self, file: Path) -> None:
        file.write_bytes(TypeAdapter(DataRecord).dump_json(self, indent=1) + b"\n")

    @classmethod
    def read(cls, folder: Path) -> "DataRecord | None":
        """None for a run from before there were any. Raises DataError for a file that is none, or has changed."""
        try:
            if changed(folder / RECORD):
                raise DataError(damaged(folder / RECORD))
            return TypeAdapter(DataRecord).validate_json(whole_bytes(folder / RECORD))
        except FileNotFoundError:
            manifest = Manifest.read(folder)
            if manifest is not None and RECORD in manifest.files:
                raise DataError(
                    f"{folder / RECORD}, which tells the classes and images of the run, is not there any more; put it "
                    "back from a copy of the run, or begin the run anew by --overwrite"
                ) from None
            return None
        except (OSError, ValidationError) as refusal:
            why = " ".join(str(refusal).split())[:200]
            raise DataError(f"{folder / RECORD} does not tell the classes of a run: {why}") from None

    def refuse_others(self, now: "DataRecord", where: Path) -> None:
        """Raise DataError where the data are no longer those that a run was begun with."""
        if self.classes != now.classes:
            for difference, text in (
                (set(now.classes) - set(self.classes), "now have a class {}, which they then had not"),
                (set(self.classes) - set(now.classes), "have no class {} any more"),
                (set(self.classes), "have their classes in another order, {} among them"),
            ):
                if difference:
                    raise DataError(f"the data of the run in {where} {text.format(repr(min(difference)))}")
        told = [
            f"in {key} {other}"
            for key, before in self.contents.items()
            if key in now.contents and (other := before.difference(now.contents[key]))
        ]
        told += [] if told else _of_skipped(self.skipped, now.skipped)
        if self.images != now.images:
            before, after = ([*it.images.items(), *it.skipped.items()] for it in (self, now))
            told.append(f"it had {_counts(before)}, and now there are {_counts(after)}")
        if told:
            raise DataError(
                f"the data of the run in {where} are not those that it was begun with: {'; '.join(told)}; put them "
                "back, or begin anew with --overwrite"
            )


def _of_skipped(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]]) -> list[str]:
    """Which image can no longer be read, or can be again."""
    told = []
    for key in dict.fromkeys([*before, *now]):
        had, has = set(before.get(key, ())), set(now.get(key, ()))
        told += [f"{min(has - had)!r} of {key} could be read then, and cannot be now"] if has - had else []
        told += [f"{min(had - has)!r} of {key} could not be read then, and can be now"] if had - has else []
    return told


def _counts(items: Iterable[tuple[str, Any]]) -> str:
    told = [
        f"{value} {name} images" if isinstance(value, int) else f"{len(value)} skipped in {name}"
        for name, value in items
    ]
    return ", ".join(told)


@dataclass(frozen=True)
class _Split:
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
        return replace(self, images=_subset(self.images, indices), targets=targets)


def open_datasets(options: DataOptions, record: DataRecord | None = None) -> Datasets:
    """Open what the recipe names. Raises DataError when it is not there, or cannot be trained on and measured.

    The classes are numbered as the training split has them, or as `record` says, which a former run has kept.
    """
    splits = _open_all(options)
    try:
        return _checked(options, splits, record)
    except DataError as refusal:  # what is missing may be behind a link that was not followed
        links = [note for split in splits for note in split.unfollowed]
        if not links:
            raise
        raise DataError(f"{refusal}; {'; '.join(links[:3])}", refusal.key) from None


def _checked(options: DataOptions, splits: list[_Split], record: DataRecord | None) -> Datasets:
    train, whole = splits[0], tuple(splits)
    names = record.classes if record is not None and record.classes else train.names
    splits = [
        _renumbered(split, names, whose="the run" if names is not train.names else train.label) for split in splits
    ]
    skipped: dict[str, tuple[str, ...]] = {}
    if options.on_error == "skip":
        for number, split in enumerate(splits):
            splits[number], left_out = _without_unreadable(split, record.skipped if record is not None else None)
            skipped |= {split.key: left_out} if left_out else {}
    num_classes = options.num_classes or len(names)
    if not num_classes:
        raise DataError(
            f"dataset {options.dataset!r} does not tell how many classes it has; set `num_classes`", "num_classes"
        )
    notes = [note for split in splits for note in split.notes]
    classless = {split.key for split in splits if split.left_out}
    notes += [
        f"{len(left)} images of {key} cannot be read{' or have no class' * (key in classless)} and are left out: "
        f"{_few(left)}"
        for key, left in skipped.items()
    ]
    for split in splits:
        _check_labels(split, num_classes)
        notes += _absent(split, names, num_classes)
    may_lack = options.num_classes is not None or record is not None
    _check_train(splits[0], names, num_classes, may_lack=may_lack)
    divided = _divided(options, splits, num_classes, names, notes)
    return replace(divided, classes=names, skipped=skipped, whole=whole)


def class_names(datasets: Datasets) -> list[str]:
    """What the classes are called, in their order; their numbers where the dataset does not say."""
    complete = len(datasets.classes) == datasets.num_classes
    return list(datasets.classes) if complete else [str(index) for index in range(datasets.num_classes)]


def check_name(name: str, root: str | None = None) -> None:
    """Raise DataError for a dataset that there is not, without looking for its images."""
    kind, slash, inner = name.partition("/")
    if not name:
        return
    if kind.lower() in ("tfds", "hfids"):
        raise DataError(
            f"dataset {name!r} is a stream, in which images have no number, so that no epoch could be gone on with in "
            "its middle and no view be cached; give the images as a folder, as tar shards in a folder (`wds/`), or by "
            "`hfds/` or `torch/`",
            "dataset",
        )
    if kind.lower() == "torch" and inner.lower() not in _TORCHVISION:
        near = nearest(name.lower(), NAMES)
        raise DataError(
            f"there is no dataset {name!r}; timm reads {', '.join(_TORCHVISION)} of torchvision{near}", "dataset"
        )
    if kind == "sklearn" and name != "sklearn/digits":
        raise DataError(f"there is no dataset {name!r}; from scikit-learn there is 'sklearn/digits'", "dataset")
    if not slash or kind.lower() not in _KINDS:
        near = nearest(name, NAMES)
        raise DataError(
            f"there is no dataset {name!r}{near or ';'} a folder of folders is given as `root`, without `dataset`, and "
            "other names begin with `torch/`, `hfds/` or `wds/`, or are `sklearn/digits`",
            "dataset",
        )


_IN_MEMORY = ("cifar10", "cifar100", "mnist", "kmnist", "fashion_mnist", "qmnist")
_OF_TWO_PARTS = ("sklearn/digits", *(f"torch/{name}" for name in _IN_MEMORY))
_FOLDERS = ("image_folder", "folder")
_TORCHVISION = (*_IN_MEMORY, "inaturalist", "inat", "places365", "imagenet", *_FOLDERS)
_KINDS = ("sklearn", "torch", "hfds", "wds")
NAMES = ("sklearn/digits", *(f"torch/{name}" for name in _TORCHVISION))  # that are known without a look at the hub
TRAINED = ("train", "training")
EVALUATED = ("val", "valid", "validation", "eval", "evaluation")  # of folders, in the order that timm looks for them
_TEST_WORDS = (*EVALUATED, "test", "testing")


def _open_all(options: DataOptions) -> list[_Split]:
    check_name(options.dataset)
    wanted = options.splits
    if len(wanted) == 1 and not options.holdout:
        raise DataError(
            "there are no images to measure on: name them as `val_split`, or hold some of the training images out, as "
            "in `holdout: 0.1`",
            "val_split",
        )
    if options.dataset.lower() in _OF_TWO_PARTS:
        for key, name in wanted.items():
            _part(options, key, name)
    opened = [_open(options, key, name) for key, name in wanted.items()]
    for number, split in enumerate(opened):
        for other in opened[:number]:
            if _overlap(other, split):
                raise DataError(
                    f"{split.label} has images of {other.label}, and no figure of images that were used before means "
                    f"anything; name other images, or hold some out: `val_split: none` with `holdout: 0.1`",
                    split.key,
                )
    return [opened[0], *(_told_of_copies(split, opened[0]) for split in opened[1:])]


def _told_of_copies(split: _Split, train: _Split) -> _Split:
    """The split, with a note where some of its images are training images too. Raises DataError where all are.

    Of a folder, up to 100 images are compared with what has their name and class among the training images, and, where
    they are hard links, with all of these.
    """
    if not isinstance(split.images, FolderImages):
        return split
    compared = spread(split.images.samples, 100)
    copies = [os.path.relpath(path, split.images.root) for path in _copies(compared, split.names, train)]
    if not copies:
        return split
    share = f"{len(copies)} of {len(compared)}"
    if len(copies) == len(compared):
        raise DataError(
            f"{split.label} is a copy of the training images: {share} images that were compared are the same bytes as "
            f"in {train.label} ({copies[0]}, ...), and no figure of images that were trained on means anything; name "
            "other images, or hold some out: `val_split: none` with `holdout: 0.1`",
            split.key,
        )
    note = f"{share} sampled images of {split.label} are also training images, the same bytes: {_few(copies, 3)}"
    return replace(split, notes=(*split.notes, note))


def _copies(compared: Sequence[tuple[str, int]], names: Sequence[str], train: _Split) -> list[str]:
    """Those of these images that lie in the training split too: of one name, class and bytes, or hard links."""
    if not isinstance(train.images, FolderImages):
        return []
    wanted = {os.path.basename(path) for path, _ in compared}
    there: dict[tuple[str, str], list[str]] = {}
    for path, target in train.images.samples:
        name = path.rpartition(os.sep)[2]
        if name in wanted:
            there.setdefault((train.names[target], name), []).append(path)
    file_of = _files_of_several_names(path for path, _ in compared)
    linked = set(_files_of_several_names(path for path, _ in train.images.samples).values()) if file_of else set()
    return [
        path
        for path, target in compared
        if any(_same_bytes(path, other) for other in there.get((names[target], os.path.basename(path)), ())[:20])
        or file_of.get(path) in linked
    ]


def _files_of_several_names(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """By the paths, which files they are names of (hard links), of those that have more names than one."""
    found = {}
    for path in paths:
        with suppress(OSError):
            about = os.stat(path)
            if about.st_nlink > 1:
                found[path] = about.st_dev, about.st_ino
    return found


def _same_bytes(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other) or (
            os.path.getsize(path) > 0 and filecmp.cmp(path, other, shallow=False)  # which reads regular files only
        )
    except OSError:
        return False


def _overlap(one: _Split, two: _Split) -> bool:
    """Whether two splits have a source or a row of a table in common, or one's folder lies in the other's."""
    if one.sources & two.sources:
        return True
    if len(one.sources) == len(two.sources) == 1:
        (first,), (second,) = one.sources, two.sources
        if first.startswith(second + os.sep) or second.startswith(first + os.sep):
            return True
    if (one.linked or two.linked) and not _real_files(one).isdisjoint(_real_files(two)):
        return True
    return any(
        part == other and max(start, begin) < min(stop, end)
        for part, start, stop in one.rows
        for other, begin, end in two.rows
    )


def _real_files(split: _Split) -> set[str]:
    samples = split.images.samples if isinstance(split.images, FolderImages) else ()
    return {os.path.realpath(path) for path, _ in samples}


def _open(options: DataOptions, key: str, split: str) -> _Split:
    kind, _, name = options.dataset.lower().partition("/")
    if kind == "sklearn":
        return _digits(options, key, split)
    if kind == "wds":
        return _shards(options, key, split)
    if kind == "hfds":
        return _hub(options, key, split)
    if not options.dataset or name in _FOLDERS:
        return _folder(options, key, split)
    return _torchvision(options, key, split)


def _part(options: DataOptions, key: str, split: str) -> str:
    """Of a dataset that has two parts: which of them a split is."""
    for part, words in (("train", TRAINED), ("validation", _TEST_WORDS)):
        if split.lower() in words:
            return part
    near = nearest(split, [*TRAINED, *_TEST_WORDS])
    raise DataError(f"{options.dataset} has no split {split!r}; it has 'train' and 'test'{near}", key)


def _digits(options: DataOptions, key: str, split: str) -> _Split:
    if options.num_classes not in (None, 10):
        raise DataError(f"num_classes {options.num_classes}: sklearn/digits has 10 classes", "num_classes")
    part = _part(options, key, split)
    pixels, targets = _digits_of(part)
    names = tuple(map(str, range(10)))
    return _Split(key, split, _Digits(pixels, targets, options.mode), names, frozenset({part}), targets)


@cache
def _digits_of(part: str) -> tuple[Any, Any]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, targets = load_digits(return_X_y=True)
    # One split for ever, whatever the seed of a run: runs are compared on the same 360 images.
    split = train_test_split(pixels.reshape(-1, 8, 8), targets, test_size=0.2, random_state=0, stratify=targets)
    train_pixels, test_pixels, train_targets, test_targets = split
    return (train_pixels, train_targets) if part == "train" else (test_pixels, test_targets)


class _Digits(Dataset[Any]):
    """The handwritten digits of scikit-learn (UCI): 8x8 grey images of the figures 0 to 9."""

    def __init__(self, pixels: Any, targets: Any, mode: str) -> None:
        self.images = [Image.fromarray((image * (255 / 16)).astype("uint8")).convert(mode) for image in pixels]
        self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], int(self.targets[index])


def _shards(options: DataOptions, key: str, split: str) -> _Split:
    skip = options.on_error == "skip"
    images = open_shards(options.root, split, mode=options.mode, num_classes=options.num_classes, skip=skip)
    images.read_labels()
    sources = frozenset(os.path.realpath(file) for file in images.files)
    left_out = tuple(map(printable, images.left_out))
    return _Split(key, split, images, (), sources, images.targets, root=str(options.root), left_out=left_out)


def _folder(options: DataOptions, key: str, split: str) -> _Split:
    folder = _split_folder(options, key, split)
    outermost = options.dataset.lower().partition("/")[2] in _FOLDERS
    found = scan_folder(folder, outermost=outermost)
    names = tuple(found.files)
    if not names:
        raise DataError(f"there are no images in {folder}; read are files that end in {' '.join(EXTENSIONS)}", key)
    samples = found.samples({name: index for index, name in enumerate(names)}, by_path=not outermost)
    return _Split(
        key=key,
        name=split,
        images=FolderImages(samples, options.mode, folder),
        names=names,
        sources=frozenset({os.path.realpath(folder)}),
        targets=np.array([target for _, target in samples]),
        empty=tuple(found.empty),
        notes=tuple(found.notes),
        linked=found.linked,
        unfollowed=tuple(found.unfollowed),
    )


def _split_folder(options: DataOptions, key: str, split: str) -> str:
    """The folder of a split in `root`, by its name or one that timm takes for the same."""
    root = options.root
    if not (root and Path(root).is_dir()):
        raise DataError(
            f"there is no folder {root!r} to read images from; set `root`, or name a `dataset` (where a run's "
            "images have moved, `eval --root DIR`)"
        )
    words = TRAINED if split in TRAINED else EVALUATED if split in EVALUATED else ()
    for name in (split, *words):
        if os.path.isdir(os.path.join(root, name)):
            return os.path.join(root, name) if name != "." else root
    there = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    has = f"there are {_few(there)}{nearest(split, there)}" if there else "it holds no folders"
    if key == "train_split":
        mend = (
            "name one of them; where these are the classes, give `train_split: .`, with `val_split: none` and "
            "`holdout: 0.1`"
        )
    else:
        mend = f"name one of them as `{key}`, or hold training images out: `val_split: none` with `holdout: 0.1`"
    raise DataError(f"there is no folder {split!r} in {root!r} for `{key}`: {has}; {mend}", key)


def _torchvision(options: DataOptions, key: str, split: str) -> _Split:
    name = options.dataset.lower().partition("/")[2]
    if not options.root:
        raise DataError(f"dataset {options.dataset!r} needs `root`, the folder that it lies in or is downloaded to")
    part = _part(options, key, split) if name in _IN_MEMORY else split
    inner: Any = _by_timm(options, part)
    if hasattr(inner, "loader"):  # of files, which is torchvision's own
        inner.loader = _Loader(options.mode)
    if hasattr(inner, "all_categories"):  # INaturalist's, which come as the disk lists them
        inner.index.sort()
    targets = getattr(inner, "targets", None)
    return _Split(
        key=key,
        name=split,
        images=_InMode(inner, options.mode),
        names=_names_of(inner),
        sources=frozenset({part}),
        targets=None if targets is None else np.asarray(targets),
        root=options.root,
    )


def _by_timm(options: DataOptions, split: str) -> Any:
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


@dataclass(frozen=True)
class _Loader:
    """How torchvision's datasets of files open one; it goes to worker processes."""

    mode: str

    def __call__(self, path: str) -> Image.Image:
        return open_image(path, self.mode)


class _InMode(Dataset[Any]):
    """A torchvision dataset with its images in one mode: MNIST's are grey, whatever the models take."""

    def __init__(self, images: Dataset[Any], mode: str) -> None:
        self.images, self.mode = images, mode

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.images[index]
        return image.convert(self.mode), target


def _names_of(dataset: Any) -> tuple[str, ...]:
    """The names of a torchvision dataset's classes by their index; none where it has none."""
    order = getattr(dataset, "class_to_idx", None) or {}
    if sorted(order.values()) == list(range(len(order))):
        return tuple(map(str, sorted(order, key=order.__getitem__)))
    classes = getattr(dataset, "classes", None) or ()  # ImageNet's have several names each
    return tuple(", ".join(name) if isinstance(name, tuple) else str(name) for name in classes)


class HubImages(Dataset[Any]):
    """A dataset of Hugging Face's `datasets`, as timm's reader has opened it. Its labels are numbers, or names."""

    def __init__(self, reader: Any, mode: str, name: str) -> None:
        self.reader, self.mode, self.name = reader, mode, name
        if reader.label_key not in reader.dataset.column_names:
            raise DataError(
                f"{name} has no column {reader.label_key!r} of labels; it has {_few(reader.dataset.column_names)}"
            )
        labels = list(reader.dataset[reader.label_key])
        kinds = {type(label) for label in labels}
        self.names = tuple(sorted(reader.class_to_idx, key=reader.class_to_idx.__getitem__))
        if kinds == {str} and not self.names:
            self.names = tuple(sorted(set(labels)))
        elif not all(issubclass(kind, int | np.integer) and kind is not bool for kind in kinds):
            found = ", ".join(sorted(kind.__name__ for kind in kinds))
            raise DataError(f"the labels of {name} are no class numbers (column {reader.label_key!r} has: {found})")
        index = {label: number for number, label in enumerate(self.names)}
        self.targets = np.array([index[label] if isinstance(label, str) else int(label) for label in labels], dtype=int)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        # Not by the reader, which opens the file at once, be it a pipe.
        value = self.reader.dataset[index][self.reader.image_key] or {}
        if value.get("bytes"):
            image = decode(BytesIO(value["bytes"]), self.mode, f"image {index} of {self.name}")
        elif value.get("path"):
            image = open_image(value["path"], self.mode)
        else:
            raise DataError(f"image {index} of {self.name} cannot be read: there is none")
        return image, int(self.targets[index])

    def content(self, index: int) -> bytes | None:
        """The bytes of an image as they are stored, where the table holds them; what they decode to may change."""
        return (self.reader.dataset[index][self.reader.image_key] or {}).get("bytes")


def _hub(options: DataOptions, key: str, split: str) -> _Split:
    images = HubImages(_by_timm(options, split).reader, options.mode, f"{options.dataset} ({split})")
    rows = _rows_of(images.reader.dataset, split)
    return _Split(key, split, images, images.names, frozenset({split}), images.targets, rows=rows)


def _rows_of(dataset: Any, split: str) -> tuple[tuple[str, int, int], ...]:
    """Which rows of which parts of a hub dataset a split such as `train[:90%]` is, where it says how many it has."""
    parts = getattr(getattr(dataset, "info", None), "splits", None)
    if not parts:
        return ()
    from datasets import ReadInstruction

    lengths = {name: part.num_examples for name, part in parts.items()}
    found = ReadInstruction.from_spec(split).to_absolute(lengths)
    return tuple((it.splitname, it.from_ or 0, lengths[it.splitname] if it.to is None else it.to) for it in found)


def _contents_of(split: _Split) -> Contents:
    images, names = split.images, split.names
    if isinstance(images, FolderImages):
        return of_files([(path, names[target]) for path, target in images.samples], images.root)
    if isinstance(images, Shards):
        return of_shards(images, split.root, split.targets)
    files = _files_of(images.images) if isinstance(images, _InMode) else []
    if files:
        return of_files(files, split.root)
    targets = [] if split.targets is None else np.asarray(split.targets).tolist()
    return of_images(images, [names[it] if 0 <= it < len(names) else str(it) for it in targets])


def _files_of(dataset: Any) -> list[tuple[str, str]]:
    """(path, class) of the images of a torchvision dataset, where it has files."""
    if hasattr(dataset, "all_categories"):
        labels = dataset.all_categories
        return [(os.path.join(dataset.root, labels[number], name), labels[number]) for number, name in dataset.index]
    classes = getattr(dataset, "classes", None) or ()
    label = {number: str(name) for number, name in enumerate(classes)}
    return [(path, label.get(target, str(target))) for path, target in getattr(dataset, "imgs", ())]


def _renumbered(split: _Split, names: Sequence[str], whose: str) -> _Split:
    """The split with the class indices of `names`. Raises DataError for a class that is none of these."""
    if not names or tuple(split.names) == tuple(names):
        return split
    numbers = {name: number for number, name in enumerate(names)}
    used = range(len(split.names)) if split.targets is None else sorted(set(split.targets.tolist()))
    unknown = [
        split.names[index] for index in used if 0 <= index < len(split.names) and split.names[index] not in numbers
    ]
    if unknown:
        near = nearest(unknown[0], names, 1)
        many = f"the classes {_few(unknown)}" if len(unknown) > 1 else f"the class {unknown[0]!r}"
        raise DataError(
            f"{split.label} has {many}, which {whose} has not, so that no model can know it{near} (there are "
            f"{_few(names)})",
            split.key,
        )
    table = [numbers.get(name, -1) for name in split.names]
    if table == list(range(len(table))):
        return replace(split, names=tuple(names))
    targets = None if split.targets is None else np.asarray(table)[split.targets]
    return replace(split, images=_with_classes(split.images, table), names=tuple(names), targets=targets)


def _with_classes(images: Dataset[Any], table: Sequence[int]) -> Dataset[Any]:
    if isinstance(images, FolderImages):
        return FolderImages([(path, table[target]) for path, target in images.samples], images.mode, images.root)
    return _Renumbered(images, table)


class _Renumbered(Dataset[Any]):
    """A dataset whose classes have other numbers."""

    def __init__(self, images: Dataset[Any], table: Sequence[int]) -> None:
        self.images, self.table = images, table

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, target = self.images[index]
        return image, self.table[target]


def _without_unreadable(split: _Split, known: Mapping[str, Sequence[str]] | None) -> tuple[_Split, tuple[str, ...]]:
    """The split without the images that cannot be read, and their names; those that a run has found, where it is known.

    Every image is decoded, by threads: which images there are is settled before the first of them is drawn.
    """
    count = len(split)
    if known is not None:
        names = set(known.get(split.key, ()))
        bad = {index for index in range(count) if names and _name_of(split.images, index) in names}
    elif isinstance(split.images, _Digits | _InMode) and not hasattr(getattr(split.images, "images", None), "loader"):
        bad = set()  # in memory
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
            starts = range(0, count, 64)
            parts = threads.map(lambda start: _unreadable(split.images, range(start, min(start + 64, count))), starts)
            bad = {index for part in parts for index in part}
    if not bad:
        return split, split.left_out
    kept = [index for index in range(count) if index not in bad]
    return split.among(kept), (*split.left_out, *(_name_of(split.images, index) for index in sorted(bad)))


def _unreadable(images: Dataset[Any], indices: Iterable[int]) -> list[int]:
    return [index for index in indices if not _can_read(images, index)]


def _can_read(images: Dataset[Any], index: int) -> bool:
    try:
        images[index]
    except DataError:
        return False
    return True


def _name_of(images: Dataset[Any], index: int) -> str:
    if isinstance(images, FolderImages):
        return printable(os.path.relpath(images.samples[index][0], images.root))
    return f"image {index}"


def _subset(images: Dataset[Any], indices: Sequence[int]) -> Subset[Any]:
    """Some of the images; of a subset, of what that is taken from."""
    if isinstance(images, Subset):
        return Subset(images.dataset, [images.indices[index] for index in indices])
    return Subset(images, list(indices))


def _check_train(train: _Split, names: Sequence[str], num_classes: int, *, may_lack: bool) -> None:
    """Raise DataError where no classifier can be learned from the training images."""
    if train.empty and not may_lack:
        raise DataError(f"{train.label} has no images of {_few(train.empty)}; put some in, or take the folder away")
    if len(train) < 2:
        raise DataError(f"{train.label} has {len(train)} image; nothing can be learned from fewer than 2", train.key)
    present = None if train.targets is None else set(np.asarray(train.targets).tolist())
    if num_classes == 1 or (present is not None and len(present) == 1):
        only = f" ({names[0]!r})" if len(names) == 1 else ""
        raise DataError(
            f"{train.label} has images of one class only{only}, and every model is right about these; a class is a "
            "folder of images, and at least 2 are needed",
            train.key,
        )
    missing = [] if present is None else [name for index, name in enumerate(names) if index not in present]
    if missing and not may_lack:
        raise DataError(
            f"{train.label} has no images of {_few(missing)}; where that is meant, say so: `num_classes: {num_classes}`"
        )


def _check_labels(split: _Split, num_classes: int) -> None:
    if not len(split):
        raise DataError(f"{split.label} has no images", split.key)
    if split.targets is None:
        return
    wrong = np.flatnonzero((split.targets < 0) | (split.targets >= num_classes))
    if len(wrong):
        first = int(wrong[0])
        raise DataError(
            f"{split.label}: {len(wrong)} labels are none of the {num_classes} classes (0 to {num_classes - 1}); the "
            f"first is {int(split.targets[first])}, of {_name_of(split.images, first)}; set `num_classes`, or mend it",
            "num_classes",
        )


def _absent(split: _Split, names: Sequence[str], num_classes: int) -> list[str]:
    if split.targets is None:
        return []
    present = set(np.asarray(split.targets).tolist())
    missing = [
        names[index] if index < len(names) else str(index) for index in range(num_classes) if index not in present
    ]
    return [f"{split.label} has no images of {len(missing)} of the {num_classes} classes: {_few(missing)}"] * bool(
        missing
    )


def _few(names: Iterable[str], most: int = 5) -> str:
    """The first of many names, as a list in a sentence."""
    shown = list(names)
    more = f" and {len(shown) - most} more" if len(shown) > most else ""
    return ", ".join(repr(name) for name in shown[:most]) + more


def _divided(
    options: DataOptions, splits: Sequence[_Split], num_classes: int, names: Sequence[str], notes: Sequence[str]
) -> Datasets:
    """The training images divided by `holdout` and `fraction`, and which images the figures are of."""
    train, *others = splits
    told = list(notes)
    held_out: _Split | None = None
    if options.holdout or options.fraction < 1:
        kept, used = _division(options, train)
        held_out = train.among(kept) if kept else None
        train = train.among(used)
        _check_train(train, names, num_classes, may_lack=True)
        told += [note.replace(train.label, "what is trained on") for note in _absent(train, names, num_classes)]
        if held_out is not None:
            lacks = _absent(held_out, names, num_classes)
            told += [note.replace(f"{held_out.label} has", "the held-out images have") for note in lacks]
        told = list(dict.fromkeys(told))
    measured = [*([] if "val_split" in options.splits or held_out is None else [held_out]), *others]
    final, curves = measured[-1], measured[0]
    return Datasets(
        train=train.images,
        test=final.images,
        num_classes=num_classes,
        held_out=held_out.images if held_out else None,
        val=curves.images if curves is not final else None,
        measured_on=_measured_on(
            *(
                f"the held-out images ({len(it)})" if it is held_out else f"{it.label} ({len(it)} images)"
                for it in (curves, final)
            )
        ),
        notes=tuple(told),
        read_from={"test": final.key, "val": curves.key},
    )


def _measured_on(curves: str, final: str) -> str:
    if curves != final:
        return f"curves are of {curves}, the final figures of {final}, which is measured once"
    if final.startswith("the held-out"):
        return f"curves and final figures are of {final}; there is no test figure (`test_split` gives one)"
    other = "`val_split` or `holdout` gives others for the curves"
    if final.startswith("val_split"):
        other = "`test_split` gives others for the final figures"
    return f"curves and final figures are both of {final}; {other}"


def _division(options: DataOptions, train: _Split) -> tuple[list[int], list[int]]:
    """(held out, trained on)"""
    count = len(train)
    kept = round(count * options.holdout)
    if options.holdout and not 0 < kept < count:
        raise DataError(f"holdout {options.holdout} of {count} training images leaves none on one side", "holdout")
    used = round((count - kept) * options.fraction)
    if not used:
        message = f"fraction {options.fraction} of {count - kept} training images is less than one image"
        raise DataError(message, "fraction")
    # One division for ever, whatever the seed of a run: runs are compared on the same images.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    parts = order[:kept], order[kept : kept + used]
    whole = train.images.dataset if isinstance(train.images, Subset) else train.images
    if isinstance(whole, Shards):  # they are read from one end to the other
        parts = sorted(parts[0]), sorted(parts[1])
    return parts

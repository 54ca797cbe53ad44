"""Data: timm's datasets and transforms, and scikit-learn's digits, which need no download."""

import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from probe_kd.batches import Batches, Pixels, collate, worker_count
from probe_kd.errors import DataError, nearest
from probe_kd.shards import Shards, open_shards
from probe_kd.spec import InputSpec


class DataOptions(BaseModel):
    """The `data:` section of a recipe. Names and meanings are those of timm's `create_dataset` and `create_transform`.

    `dataset` is `sklearn/digits`, or what timm's `create_dataset` reads: `torch/cifar100`, `torch/fashion_mnist`,
    `hfds/...`, a folder of folders (empty name), a folder of tar shards (`wds/NAME`); not streams (`tfds/`, `hfids/`).
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
    val_split: str = "validation"
    download: bool = False
    num_classes: int | None = Field(default=None, ge=1)
    input_size: tuple[int, int, int]
    batch_size: int = Field(default=128, ge=1)
    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=256)] = "auto"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    crop_pct: float | None = Field(default=None, gt=0, le=1)
    no_aug: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
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

    @model_validator(mode="after")
    def _mixes_in_pairs(self) -> Self:
        if self.mixes and self.batch_size % 2:
            raise ValueError(f"batch_size {self.batch_size} is odd, and mixup and cutmix mix images in pairs")
        return self


@dataclass(frozen=True)
class Datasets:
    """Training and test images, as PIL images with a class index, and how many classes there are.

    `held_out` are the training images that are kept from training.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    held_out: Dataset[Any] | None = None


def open_datasets(options: DataOptions) -> Datasets:
    """Open what the recipe names. Raises DataError when it is not there, or does not say how many classes it has."""
    found = _open(options)
    if not options.holdout and options.fraction == 1:
        return found
    count = len(found.train)  # type: ignore[arg-type]
    kept = round(count * options.holdout)
    if options.holdout and not 0 < kept < count:
        raise DataError(f"holdout {options.holdout} of {count} training images leaves none on one side")
    used = round((count - kept) * options.fraction)
    if not used:
        raise DataError(f"fraction {options.fraction} of {count - kept} training images is less than one image")
    # One division for ever, whatever the seed of a run: runs are compared on the same images.
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    parts = order[kept : kept + used], order[:kept]
    if isinstance(found.train, Shards):  # they are read from one end to the other
        parts = sorted(parts[0]), sorted(parts[1])
    held_out = Subset(found.train, parts[1]) if kept else None
    return replace(found, train=Subset(found.train, parts[0]), held_out=held_out)


def mixer(options: DataOptions, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's Mixup and CutMix: a batch (images, class indices) to (images, distributions); None without."""
    from timm.data import Mixup

    if not options.mixes:
        return None
    mix = Mixup(
        mixup_alpha=options.mixup,
        cutmix_alpha=options.cutmix,
        prob=options.mixup_prob,
        switch_prob=options.mixup_switch_prob,
        mode=options.mixup_mode,
        label_smoothing=0.0,  # the loss has its own
        num_classes=num_classes,
    )

    def mixed(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2  # a dataset smaller than a batch may leave an odd image
        answer: tuple[Tensor, Tensor] = mix(images[:even], target[:even])
        return answer

    return mixed


def _open(options: DataOptions) -> Datasets:
    if options.dataset == "sklearn/digits":
        return _digits(options)
    if options.dataset.startswith("sklearn/"):
        raise DataError(f"there is no dataset {options.dataset!r}; from scikit-learn there is 'sklearn/digits'")
    train, test = (_timm_dataset(options, split, training) for split, training in _splits(options))
    return Datasets(train, test, options.num_classes or _count_classes(train, options.dataset))


WINDOW = 8192  # images of shards that are mixed with each other, as many as timm's reader mixes


class Views(Sampler[tuple[int, int]]):
    """The order of the training images, and the seed of the view in which each is seen: (index, seed).

    Both follow from the seed of the run and the age of the student in epochs alone. So a run that goes on in the
    middle of an epoch, one with other workers or processes, and the student alone beside the student, all see the same.
    Where the images lie in `shards`, of so many images each, the shards come in another order in every epoch, and
    images within each window of it: so a disk reads about one place at a time.
    """

    def __init__(self, count: int, seed: int, views: int | None = None, *, shards: Sequence[int] | None = None) -> None:
        self.count, self.seed, self.views, self.shards = count, seed, views, shards
        self.age = 0

    def begin(self, age: int) -> None:
        """An epoch begins, before which the recipe has `age` others."""
        self.age = age

    @property
    def view(self) -> int:
        """Which view of every image this epoch shows. An epoch with the same one shows the same images."""
        return self.age % self.views if self.views else self.age

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[tuple[int, int]]:
        chance = torch.Generator().manual_seed(_mixed(self.seed, self.age, 0))
        if self.shards is None:
            return iter(self.of(torch.randperm(self.count, generator=chance).tolist()))
        shards = torch.split(torch.arange(self.count), list(self.shards))
        row = torch.cat([shards[index] for index in torch.randperm(len(shards), generator=chance).tolist()])
        windows = [window[torch.randperm(len(window), generator=chance)] for window in torch.split(row, WINDOW)]
        return iter(self.of(torch.cat(windows).tolist()))

    def of(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """These images, each with the seed of this epoch's view."""
        view = _mixed(self.seed, self.view, 1)
        return [(index, view) for index in indices]


def _mixed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def loader(dataset: Dataset[Any], options: DataOptions, wanted: InputSpec, *, training: bool, seed: int = 0) -> Batches:
    """Batches of images normalised as `wanted` says, with their class indices.

    Training batches are augmented and shuffled, as the `Views` that is their sampler says, and carry the indices of
    the images in the dataset as a third tensor. Workers live as long as the loader, from one epoch to the next.
    """
    count, channels = len(dataset), wanted.size[0]  # type: ignore[arg-type]
    workers = worker_count(options.workers, -(-count // options.batch_size))
    batches = DataLoader(
        _Transformed(dataset, _transform(options, wanted, training), channels),
        batch_size=options.batch_size,
        sampler=Views(count, seed, options.num_views, shards=_shards_of(dataset)) if training else None,
        drop_last=training and count > options.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or an iterator would draw its seed from the numbers that dropout uses
    )
    mean, std = (_per_channel(numbers, channels) for numbers in (wanted.mean, wanted.std))
    return Batches(batches, mean, std, ahead=training)


def _shards_of(dataset: Dataset[Any]) -> list[int] | None:
    """How many of the images lie in each shard; None where they are not in shards."""
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    if not isinstance(whole, Shards):
        return None
    ends = np.searchsorted(dataset.indices, whole.starts) if isinstance(dataset, Subset) else whole.starts
    return [int(count) for count in np.diff(ends)]


def readable(batches: Iterable[Any], which: str = "training") -> Iterator[Any]:
    """The batches. Raises DataError where one of them cannot be had."""
    found = iter(batches)
    while True:
        try:
            batch = next(found)
        except StopIteration:
            return
        except Exception as refusal:  # datasets, image files and worker processes fail in every way there is
            text = " ".join(str(refusal).split()) or type(refusal).__name__
            text = text.rpartition(f"{type(refusal).__name__}: ")[2]  # without the traceback that a worker sends along
            raise DataError(f"cannot read a batch of {which} images: {text[-500:]}") from refusal
        _hear_of_workers_only_when_waiting()
        yield batch


def _hear_of_workers_only_when_waiting() -> None:
    """Take back the handler by which torch tells of a dead worker.

    It raises wherever the process is at that moment, be it half way through an update or through a checkpoint that
    is being written. A loader that waits for a batch looks after its workers by itself, every five seconds.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    if number is None or threading.current_thread() is not threading.main_thread():
        return
    if getattr(signal.getsignal(number), "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(number, signal.SIG_DFL)


def _transform(options: DataOptions, wanted: InputSpec, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    from timm.data import create_transform

    channels = wanted.size[0]
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        input_size=wanted.size,
        is_training=training,
        no_aug=options.no_aug,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter or None,  # one of 0 changes nothing, and takes longer than a crop
        auto_augment=options.aa,
        interpolation=options.interpolation if training or options.interpolation != "random" else "bicubic",
        mean=_per_channel(wanted.mean, channels),
        std=_per_channel(wanted.std, channels),
        re_prob=options.reprob if training else 0.0,
        crop_pct=options.crop_pct,
    )
    return transform


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else values * channels


def _drawing(transform: Any) -> tuple[Callable[[Image.Image], Image.Image], Callable[[Tensor], Tensor] | None]:
    """What a transform of timm does to an image before it becomes numbers, and its random erasing, if it has one.

    The rest, division and normalisation, is the same for all images, and `Batches` does it.
    """
    from timm.data.random_erasing import RandomErasing
    from torchvision.transforms import Compose

    steps = transform.transforms
    erasing = steps.pop() if isinstance(steps[-1], RandomErasing) else None
    *first, _to_tensor, _normalize = steps
    return Compose(first), erasing


class _Transformed(Dataset[Any]):
    """A dataset of images seen through a transform, in as many channels as the models take.

    An index with a seed is that of a training image: the transform draws its random numbers from that seed alone.
    """

    def __init__(self, images: Dataset[Any], transform: Callable[[Image.Image], torch.Tensor], channels: int) -> None:
        self.images, self.mode = images, "L" if channels == 1 else "RGB"
        self.draw, self.erase = _drawing(transform)

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int | tuple[int, int]) -> Pixels:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> list[Pixels]:
        with _random_numbers_aside():
            return [self._drawn(index) if isinstance(index, int) else self._seen(*index) for index in indices]

    def _drawn(self, index: int) -> Pixels:
        image, target = self.images[index]
        drawn = self.draw(image.convert(self.mode) if image.mode != self.mode else image)
        return Pixels(np.atleast_3d(np.asarray(drawn)), int(target))

    def _seen(self, index: int, view: int) -> Pixels:
        seed = _mixed(view, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        drawn = self._drawn(index)
        return drawn._replace(position=index, erased=self._erased(drawn.pixels) if self.erase else None)

    def _erased(self, pixels: UInt8[np.ndarray, "height width channels"]) -> Bool[Tensor, "1 height width"]:
        """Where timm's random erasing, which writes zeros, would write."""
        assert self.erase is not None
        return self.erase(torch.ones(1, *pixels.shape[:2])) == 0


@contextmanager
def _random_numbers_aside() -> Iterator[None]:
    """What is drawn or seeded inside, in any of the three generators that transforms use, is not noticed outside."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class _Digits(Dataset[Any]):
    """The handwritten digits of scikit-learn (UCI): 8x8 grey images of the figures 0 to 9."""

    def __init__(self, pixels: Any, targets: Any, mode: str) -> None:
        self.images = [Image.fromarray((image * (255 / 16)).astype("uint8")).convert(mode) for image in pixels]
        self.targets = targets

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.images[index], int(self.targets[index])


def _digits(options: DataOptions) -> Datasets:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if options.num_classes not in (None, 10):
        raise DataError(f"num_classes {options.num_classes}: sklearn/digits has 10 classes")
    pixels, targets = load_digits(return_X_y=True)
    # One split for ever, whatever the seed of a run: runs are compared on the same 360 images.
    split = train_test_split(pixels.reshape(-1, 8, 8), targets, test_size=0.2, random_state=0, stratify=targets)
    train_pixels, test_pixels, train_targets, test_targets = split
    mode = "L" if options.input_size[0] == 1 else "RGB"
    return Datasets(_Digits(train_pixels, train_targets, mode), _Digits(test_pixels, test_targets, mode), 10)


def _splits(options: DataOptions) -> tuple[tuple[str, bool], tuple[str, bool]]:
    return (options.train_split, True), (options.val_split, False)


_TORCHVISION = (
    "cifar10",
    "cifar100",
    "mnist",
    "kmnist",
    "fashion_mnist",
    "qmnist",
    "inaturalist",
    "places365",
    "image_folder",
)


def _timm_dataset(options: DataOptions, split: str, training: bool) -> Dataset[Any]:
    from timm.data import create_dataset

    grey, kind = options.input_size[0] == 1, options.dataset.lower().partition("/")[0]
    if kind in ("tfds", "hfids"):
        raise DataError(
            f"dataset {options.dataset!r} is a stream, in which images have no number, so that no epoch could be "
            "gone on with in its middle and no view be cached; give the images as a folder, as tar shards in a folder "
            "(`wds/`), or by `hfds/` or `torch/`"
        )
    if kind == "wds":
        return open_shards(options.root, split, mode="L" if grey else "RGB", num_classes=options.num_classes)
    if not options.dataset and not (options.root and Path(options.root).is_dir()):
        raise DataError(f"there is no folder {options.root!r} to read images from; set `root`, or name a `dataset`")
    if options.dataset.removeprefix("torch/") in _TORCHVISION and not options.root:
        raise DataError(f"dataset {options.dataset!r} needs `root`, the folder that it lies in or is downloaded to")
    try:
        dataset: Dataset[Any] = create_dataset(
            options.dataset,
            root=options.root,
            split=split,
            is_training=training,
            download=options.download,
            input_img_mode="L" if grey else "RGB",
        )
    except Exception as refusal:  # timm, torchvision and the hub raise anything
        raise DataError(_why_unreadable(options, split, refusal)) from refusal
    return dataset if hasattr(dataset, "reader") else _InMode(dataset, options.input_size[0])


def _why_unreadable(options: DataOptions, split: str, refusal: Exception) -> str:
    text = " ".join(str(refusal).split()) or type(refusal).__name__
    kind, _, name = options.dataset.partition("/")
    if kind == "torch":
        if name not in _TORCHVISION:
            text += nearest(name, _TORCHVISION)
        elif options.download:
            text += " (without a network, put the files there as torchvision would)"
        else:
            text += " (`download: true` fetches it)"
    if options.root is None and kind not in ("hfds", "hfids", "tfds"):  # these know where they keep things
        text += "; it has no `root`, the folder where it lies"
    where = f" in {options.root!r}" if options.root else ""
    return f"cannot read the {split!r} split of dataset {options.dataset!r}{where}: {text}"


class _InMode(Dataset[Any]):
    """A torchvision dataset with its images in one mode: MNIST's are grey, whatever the models take."""

    def __init__(self, images: Dataset[Any], channels: int) -> None:
        self.images, self.mode = images, "L" if channels == 1 else "RGB"

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.images[index]
        return image.convert(self.mode), target


def _count_classes(dataset: Dataset[Any], name: str) -> int:
    inner = getattr(dataset, "images", dataset)
    for holder in (inner, getattr(inner, "reader", None)):
        for attribute in ("classes", "class_to_idx"):
            found = getattr(holder, attribute, None)
            if found:
                return len(found)
    raise DataError(f"dataset {name!r} does not tell how many classes it has; set `num_classes`")


def class_names(datasets: Datasets) -> list[str]:
    """What the classes are called, in their order; their numbers where the dataset does not say."""
    inner = getattr(datasets.test, "images", datasets.test)
    for holder in (inner, getattr(inner, "reader", None), getattr(datasets.test, "reader", None)):
        order = getattr(holder, "class_to_idx", None) or {}
        names = {int(index): str(name) for name, index in order.items()}
        if names.keys() == set(range(datasets.num_classes)):
            return [names[index] for index in range(datasets.num_classes)]
    return [str(index) for index in range(datasets.num_classes)]

"""Loaders: from data sets to batches by timm's transforms, in an order in which a run can resume anywhere."""

import random
import re
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from probe_kd.data.batches import Batches, Pixels, RawBatch, collate, worker_count
from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.memory import DecodedImages, PixelStore, once
from probe_kd.data.options import DataOptions
from probe_kd.data.shards import Shards
from probe_kd.data.sources import in_memory
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError

__all__ = ["DataOptions", "Datasets", "Views", "loader", "mixer", "open_datasets", "placeholder", "readable"]


def placeholder(datasets: Datasets, count: int) -> Tensor | None:
    """A target in the form of these data for `count` images of no meaning; None without labels."""
    if datasets.labels == "multilabel":
        return torch.zeros(count, datasets.num_classes)
    return None if datasets.labels == "none" else torch.zeros(count, dtype=torch.long)


def mixer(options: DataOptions, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """timm's Mixup and CutMix: a batch (images, class indices) to (images, distributions); None without.

    Multi-hot labels are mixed as they are, and without labels only the images are.
    """
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
        num_classes=num_classes or 1,
        multi_label=options.labels == "multilabel",
    )

    def mixed(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        even = len(images) // 2 * 2  # a dataset smaller than a batch may leave an odd image
        answer: tuple[Tensor, Tensor] = mix(images[:even], target[:even])
        return answer

    return mixed


# Reads what is stored of images in a view: the tensors by (indices, seed of the view), or None unless all are there.
Rows = Callable[[Sequence[int], int], list[Tensor] | None]
WINDOW = 8192  # images of shards that are mixed with each other, as many as timm's reader mixes


class Views(Sampler[tuple[int, int]]):
    """The order of the training images, and the seed of the view in which each is seen: (index, seed).

    Both follow from the seed of the run and the age of the student in epochs alone. So a run that goes on in the
    middle of an epoch, one with other workers or processes, and the baseline beside the student, all see the same.
    Where the images lie in `shards`, of so many images each, the shards come in another order in every epoch, and
    images within each window of it: so a disk reads about one place at a time. With the classes of the images as
    `balanced`, the images of an epoch are drawn instead, with replacement: each from a class that is drawn first, so
    that every class comes equally often. An image that comes several times in an epoch has one view. With
    `only`, an epoch has these images in this order.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        views: int | None = None,
        *,
        shards: Sequence[int] | None = None,
        balanced: Int[np.ndarray, " images"] | None = None,
        only: Sequence[int] | None = None,
    ) -> None:
        self.count, self.seed, self.views, self.shards, self.only = count, seed, views, shards, only
        self.by_class = None if balanced is None else [*map(torch.from_numpy, _by_class(balanced))]
        self.age = 0

    def begin(self, age: int) -> None:
        """Begin an epoch after `age` others of the recipe."""
        self.age = age

    @property
    def view(self) -> int:
        """Which view of every image this epoch shows. An epoch with the same one shows the same images."""
        return self.age % self.views if self.views else self.age

    def __len__(self) -> int:
        return self.count if self.only is None else len(self.only)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.only is not None:
            return iter(self.of(self.only))
        generator = torch.Generator().manual_seed(_combined_seed(self.seed, self.age, 0))
        if self.by_class is not None:
            return iter(self.of(self._drawn(self.by_class, generator)))
        if self.shards is None:
            return iter(self.of(torch.randperm(self.count, generator=generator).tolist()))
        shards = torch.split(torch.arange(self.count), list(self.shards))
        order = torch.cat([shards[index] for index in torch.randperm(len(shards), generator=generator).tolist()])
        windows = [window[torch.randperm(len(window), generator=generator)] for window in torch.split(order, WINDOW)]
        return iter(self.of(torch.cat(windows).tolist()))

    def _drawn(self, by_class: Sequence[Tensor], generator: torch.Generator) -> list[int]:
        classes = torch.randint(len(by_class), (self.count,), generator=generator)
        indices = torch.empty(self.count, dtype=torch.long)
        for number, images in enumerate(by_class):
            places = (classes == number).nonzero().flatten()
            indices[places] = images[torch.randint(len(images), (len(places),), generator=generator)]
        return indices.tolist()

    def of(self, indices: Sequence[int]) -> list[tuple[int, int]]:
        """These images, each with the seed of this epoch's view."""
        seed = self.view_seed
        return [(index, seed) for index in indices]

    @property
    def view_seed(self) -> int:
        """The seed of this epoch's view."""
        return seed_of_view(self.seed, self.view)

    @property
    def seeds_of_views(self) -> list[int]:
        """The seeds of all views; none if every epoch has a new one."""
        return [seed_of_view(self.seed, view) for view in range(self.views or 0)]


def seed_of_view(seed: int, view: int) -> int:
    """The seed of a view of all images, in a run with this seed."""
    return _combined_seed(seed, view, 1)


def _by_class(classes: Int[np.ndarray, " images"]) -> list[Int[np.ndarray, " images_of_class"]]:
    """The indices of the images of each class that has any."""
    order = np.argsort(classes, kind="stable")
    _, starts = np.unique(classes[order], return_index=True)
    return np.split(order, starts[1:])


def _combined_seed(*numbers: int) -> int:
    """One seed of 63 bits from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def loader(
    dataset: Dataset[Any],
    options: DataOptions,
    spec: InputSpec,
    *,
    training: bool,
    seed: int = 0,
    balanced: Int[np.ndarray, " images"] | None = None,
    only: Sequence[int] | None = None,
    rows: Mapping[str, Rows] | None = None,
) -> Batches:
    """Batches of images normalised as `spec` says, with their class indices.

    Training batches are augmented and shuffled, as the `Views` that is their sampler says, and carry the indices of
    the images in the dataset as a third tensor. `balanced` are the classes of the images, for `Views`. With `only`,
    they are these images, and all of them. Workers live as long as the loader, from one epoch to the next, and read
    `rows` with the images.
    """
    spec = spec.or_plain()  # there is no model here to ask
    count, channels = len(dataset), spec.size[0]  # type: ignore[arg-type]
    workers = worker_count(options.workers, -(-count // options.batch_size))
    shards = _shards_of(dataset)
    sampler = Views(count, seed, options.num_views, shards=shards, balanced=balanced, only=only) if training else None
    images = _Transformed(dataset, _transform(options, spec, training), channels)
    images.rows = rows or {}
    if options.memory:
        _remember(images, options, spec.size, sampler)
    batches = DataLoader(
        images,
        batch_size=options.batch_size,
        sampler=sampler,
        drop_last=training and only is None and count > options.batch_size,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_collated,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # or an iterator would draw its seed from the numbers that dropout uses
    )
    mean, std = (_per_channel(numbers, channels) for numbers in (spec.mean, spec.std))
    return Batches(batches, mean, std, ahead=training)


def _collated(batch: Any) -> Any:
    """The batch as it is, because the data set makes batches of images itself."""
    return batch


def _remember(images: "_Transformed", options: DataOptions, size: tuple[int, ...], sampler: Views | None) -> None:
    """Keep in memory what does not change: the transformed images of all views, or the decoded images."""
    seeds: Sequence[int | None] = [None] if sampler is None else sampler.seeds_of_views
    if not seeds:
        if not in_memory(images.images):
            images.images = once(images.images, images.mode, partial(DecodedImages, images.images, images.mode))
        return
    shape_of = options.model_dump_json(exclude={"batch_size", "workers"})
    first = 0 if seeds[0] is None else (0, seeds[0])
    key = shape_of, size, tuple(seeds)
    images.store = once(images.images, key, lambda: PixelStore(len(images), seeds, images[first]))


def load(batches: Batches) -> None:
    """Decode all images, if they are to be in memory as they are. Raises DataError if one cannot be read."""
    images: Any = getattr(batches.loader.dataset, "images", None)
    if isinstance(images, DecodedImages):
        images.load()


def _shards_of(dataset: Dataset[Any]) -> list[int] | None:
    """The number of images in each shard; None if the images are not in shards."""
    whole = dataset.dataset if isinstance(dataset, Subset) else dataset
    if not isinstance(whole, Shards):
        return None
    ends = np.searchsorted(dataset.indices, whole.starts) if isinstance(dataset, Subset) else whole.starts
    return [int(count) for count in np.diff(ends)]


def readable(batches: Iterable[Any], which: str = "training") -> Iterator[Any]:
    """Yield the batches. Raises DataError if one of them cannot be read."""
    iterator = iter(batches)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as refusal:  # datasets, image files and worker processes fail in every way there is
            text = " ".join(str(refusal).split()) or type(refusal).__name__
            text = text.rpartition(f"{type(refusal).__name__}: ")[2]  # without the traceback that a worker sends along
            workers = getattr(getattr(batches, "loader", None), "num_workers", 0)
            advice = _dead_worker_message(refusal) if workers else ""
            if isinstance(refusal, DataError) and "cannot be read: " in text:
                advice = "; mend or delete it, or leave out all that cannot be read by `data: {on_error: skip}`"
            raise DataError(f"cannot read a batch of {which} images: {text[-500:]}{advice}") from refusal
        _restore_sigchld_handler()
        yield batch


def _dead_worker_message(refusal: Exception) -> str:
    """What to add to an error if it means that a worker process of the loader has died; else empty.

    Errors that a worker itself raises begin with "Caught" in torch.
    """
    text = str(refusal)
    broken = isinstance(refusal, ConnectionError | EOFError) or re.search(r"DataLoader worker \(pid|ancdata", text)
    if not broken or text.startswith("Caught "):
        return ""
    return (
        ". A process that reads images has died: often the system has ended it for want of memory. Try fewer of them, "
        "as by `data: {workers: 1}`, or none by `workers: 0`"
    )


def _restore_sigchld_handler() -> None:
    """Remove torch's signal handler for dead workers.

    The handler raises wherever the process is at that moment, even in the middle of an update or of writing a
    checkpoint. A loader that waits for a batch checks its workers itself, every five seconds.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    if number is None or threading.current_thread() is not threading.main_thread():
        return
    if getattr(signal.getsignal(number), "__module__", "") == "torch.utils.data._utils.signal_handling":
        signal.signal(number, signal.SIG_DFL)


def _transform(options: DataOptions, spec: InputSpec, training: bool) -> Callable[[Image.Image], torch.Tensor]:
    from timm.data import create_transform

    channels = spec.size[0]
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        input_size=spec.size,
        is_training=training,
        no_aug=options.no_aug,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        vflip=options.vflip,
        color_jitter=options.color_jitter or None,  # one of 0 changes nothing, and takes longer than a crop
        auto_augment=options.aa,
        interpolation=options.interpolation if training or options.interpolation != "random" else "bicubic",
        mean=_per_channel(spec.mean, channels),
        std=_per_channel(spec.std, channels),
        re_prob=options.reprob if training else 0.0,
        crop_pct=options.crop_pct,
    )
    _posterize_to_one_bit_or_more(transform)
    return transform


def _posterize_to_one_bit_or_more(transform: Any) -> None:
    """Make timm's policies posterize to at least one bit. They also draw 0 bits (black), which Pillow 13 rejects.

    Changes only the operations of this transform.
    """
    from timm.data.auto_augment import AugmentOp, posterize

    if isinstance(transform, AugmentOp):
        if transform.aug_fn is posterize:
            transform.aug_fn = _posterize
    elif isinstance(transform, list | tuple):
        for part in transform:
            _posterize_to_one_bit_or_more(part)
    else:
        for name in ("transforms", "ops", "policy"):  # of Compose; RandAugment and AugMix; AutoAugment
            _posterize_to_one_bit_or_more(getattr(transform, name, ()))


def _posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    from timm.data.auto_augment import posterize

    posterized: Image.Image = posterize(image, max(bits_to_keep, 1))
    return posterized


def _per_channel(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    return values if len(values) == channels else values * channels


def _drawing(transform: Any) -> tuple[Callable[[Image.Image], Image.Image], Callable[[Tensor], Tensor] | None]:
    """The steps of a timm transform up to the conversion to a tensor, and its random erasing, if it has one.

    `Batches` does the rest, division and normalisation, which is the same for all images.
    """
    from timm.data.random_erasing import RandomErasing
    from torchvision.transforms import Compose

    steps = transform.transforms
    erasing = steps.pop() if isinstance(steps[-1], RandomErasing) else None
    *first, _to_tensor, _normalize = steps
    return Compose(first), erasing


class _Transformed(Dataset[Any]):
    """A dataset of images seen through a transform, in as many channels as the models take.

    An index with a seed is that of a training image: the transform draws its random numbers from that seed alone. Of
    training images, `rows` reads by name what is stored of them in this view.
    """

    def __init__(self, images: Dataset[Any], transform: Callable[[Image.Image], torch.Tensor], channels: int) -> None:
        self.images, self.mode = images, "L" if channels == 1 else "RGB"
        self.draw, self.erase = _drawing(transform)
        self.store: PixelStore | None = None
        self.rows: Mapping[str, Rows] = {}

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, key: int | tuple[int, int]) -> Pixels:
        with _preserved_random_states():
            return self._seen(key)

    def __getitems__(self, keys: Sequence[int | tuple[int, int]]) -> RawBatch:
        """The batch of these images."""
        with _preserved_random_states():
            images = [self._seen(key) for key in keys]
        return collate(images)._replace(rows=self._rows_of(keys))

    def _rows_of(self, keys: Sequence[int | tuple[int, int]]) -> dict[str, list[Tensor]]:
        """The stored rows of training images, which are all in one view."""
        in_view = [key for key in keys if not isinstance(key, int)]
        indices = [index for index, _ in in_view]
        rows = {name: read(indices, in_view[0][1]) for name, read in self.rows.items()}
        return {name: of_name for name, of_name in rows.items() if of_name is not None}

    def _seen(self, key: int | tuple[int, int]) -> Pixels:
        """The image as it is, or in a view: from memory if it is there."""
        index, view = (key, None) if isinstance(key, int) else key
        stored = None if self.store is None else self.store.find(index, view)
        if stored is not None:
            return stored
        image = self._drawn(index) if view is None else self._view_of(index, view)
        if self.store is not None:
            self.store.keep(index, view, image)
        return image

    def _drawn(self, index: int) -> Pixels:
        image, target = self.images[index]
        drawn = self.draw(image.convert(self.mode) if image.mode != self.mode else image)
        return Pixels(np.atleast_3d(np.asarray(drawn)), target if isinstance(target, np.ndarray) else int(target))

    def _view_of(self, index: int, view: int) -> Pixels:
        seed = _combined_seed(view, index)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        drawn = self._drawn(index)
        return drawn._replace(position=index, erased=self._erased(drawn.pixels) if self.erase else None)

    def _erased(self, pixels: UInt8[np.ndarray, "height width channels"]) -> Bool[Tensor, "1 height width"]:
        """The mask of pixels that timm's random erasing would set to zero."""
        assert self.erase is not None
        return self.erase(torch.ones(1, *pixels.shape[:2])) == 0


@contextmanager
def _preserved_random_states() -> Iterator[None]:
    """Restore the states of the three random generators that transforms use when the block ends."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

"""Whether a teacher's cache is faster than the teacher: a batch of rows read, beside the teacher run on that batch."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import psutil
import torch
from torch import Tensor

from probe_kd.data.cache import TeacherCache
from probe_kd.files.atomic import to_disk
from probe_kd.methods.distiller import Distiller
from probe_kd.training.models import Models, TrainedModel
from probe_kd.training.teacher_cache import stored_targets

MOST_TIMED = 64  # images
ROUNDS = 3


@dataclass(frozen=True)
class CacheCost:
    """The seconds in which a stage gets a teacher's targets of `images` images, medians of three.

    - `memory`, `disk`: read from the cache, if the system still holds the rows in memory, and if it does not
    - `asked`: computed by the teacher
    - `size`: the bytes of the whole cache of this stage, and `fits` whether the memory that is free now can hold it
    """

    stage: str
    teacher: str
    images: int
    memory: float
    disk: float
    asked: float
    size: int
    fits: bool

    @property
    def read(self) -> float:
        """The seconds in which the rows are read where the system can or cannot hold them in memory."""
        return self.memory if self.fits else self.disk

    @property
    def is_slower(self) -> bool:
        return self.read > self.asked


def cache_costs(
    models: Models, trained: TrainedModel, distiller: Distiller, stage: str, images: Tensor
) -> Iterator[CacheCost]:
    """Measure the caches that a stage reads, on some of these images. What is written for this is deleted."""
    for name, options in models.plan.recipe.teachers_by_name.items():
        if options.cache and distiller.targets_of(name):
            place = Path(options.cache).absolute()
            existing = next(folder for folder in (place, *place.parents) if folder.exists())
            with TemporaryDirectory(prefix=".probe-kd-check-", dir=existing) as folder:
                taps = stored_targets(models, name, trained, distiller)
                cache = TeacherCache(Path(folder), taps, min(len(images), MOST_TIMED))
                yield _measured(models, distiller, cache, (stage, name), images[:MOST_TIMED])


def _measured(
    models: Models, distiller: Distiller, cache: TeacherCache, names: tuple[str, str], images: Tensor
) -> CacheCost:
    order = torch.randperm(cache.count, generator=torch.Generator().manual_seed(0))

    def ask() -> list[Tensor]:
        with torch.no_grad(), models.accelerator.autocast():
            return distiller.teacher_targets(images, [names[1]])

    def read() -> list[Tensor]:
        return [feature.to(images.device) for feature in cache.find(order) or ()]

    cache.prepare(0)
    cache.begin(0)
    cache.keep(torch.arange(cache.count), ask())
    cache.flush()
    asked = [_seconds(ask, images.device) for _ in range(ROUNDS)]
    disk = []
    for _ in range(ROUNDS):
        _forget(cache)
        cache.begin(0)
        disk.append(_seconds(read, images.device))
    memory = [_seconds(read, images.device) for _ in range(ROUNDS)]
    cache.close()
    views = models.plan.recipe.data.num_views or 1
    size = sum(tap.bytes for tap in cache.taps) * len(models.plan.datasets.train) * views  # type: ignore[arg-type]
    fits = size < psutil.virtual_memory().available
    return CacheCost(*names, cache.count, median(memory), median(disk), median(asked), size, fits)


def _forget(cache: TeacherCache) -> None:
    """Close a cache and let the system drop its rows from memory, where it can be told to."""
    cache.close()
    for tap in cache.taps:
        path = cache.path(tap, 0)
        to_disk(path)
        if hasattr(os, "posix_fadvise"):  # macOS has none, and then `disk` is measured from memory
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def _seconds(work: Callable[[], list[Tensor]], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started

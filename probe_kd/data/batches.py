"""From the uint8 pixels of a DataLoader's workers to normalised images on the device of a model.

Workers send uint8, a quarter of the bytes of float32, and the device normalises: that is a thousandth of a step on a
GPU, and a tenth of a worker's time. The arithmetic is that of torchvision's `ToTensor` and `Normalize`, operation by
operation, so the images have the same bits wherever they are normalised.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from accelerate import Accelerator, skip_first_batches
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader

MOST_WORKERS = 16  # more only wait for each other's memory
FEWEST_BATCHES = 2  # an epoch for each worker: fewer are read before the last worker has begun


class Pixels(NamedTuple):
    """One image from the data set of a loader: uint8 pixels, the label, and what training adds.

    The label is a class index or a multi-hot vector. `erased` marks the pixels that random erasing takes, and
    `position` is the index of the image in the dataset.
    """

    pixels: UInt8[np.ndarray, "height width channels"]
    target: int | Float[np.ndarray, " classes"]
    position: int | None = None
    erased: Bool[Tensor, "1 height width"] | None = None


class RawBatch(NamedTuple):
    """A batch of `Pixels` as it leaves a worker. In memory the channels are last, as a decoder writes them.

    `rows` is what is stored of these images elsewhere, as in the caches of teachers, by a name.
    """

    pixels: UInt8[Tensor, "batch channels height width"]
    target: Int[Tensor, " batch"] | Float[Tensor, "batch classes"]
    position: Int[Tensor, " batch"] | None = None
    erased: Bool[Tensor, "batch 1 height width"] | None = None
    rows: Mapping[str, list[Tensor]] | None = None


def collate(images: Sequence[Pixels]) -> RawBatch:
    """The images as one batch."""
    pixels = torch.from_numpy(np.stack([image.pixels for image in images])).permute(0, 3, 1, 2)
    target = torch.from_numpy(np.stack([np.asarray(image.target) for image in images]))
    positions = [image.position for image in images if image.position is not None]
    erased = [image.erased for image in images if image.erased is not None]
    return RawBatch(
        pixels, target, torch.tensor(positions) if positions else None, torch.stack(erased) if erased else None
    )


class Batches:
    """The batches of a DataLoader as (images, target) or, of training images, (images, target, position).

    `images` are float32, normalised by `mean` and `std`, on `device`; so is `target`. `position` stays on the CPU,
    where the cache of a teacher looks images up. If rows are stored of all images of a batch, they are a fourth part,
    on `device`.

    On a GPU nothing waits: copies are asynchronous, and training batches (`ahead`) are copied and normalised on a
    stream of their own while the step before them runs.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        mean: Sequence[float],
        std: Sequence[float],
        *,
        device: torch.device | str = "cpu",
        memory_format: torch.memory_format = torch.contiguous_format,
        ahead: bool = False,
    ) -> None:
        self.loader, self.device, self.memory_format, self.ahead = loader, torch.device(device), memory_format, ahead
        self.mean, self.std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (mean, std))
        self.mean, self.std = self.mean.to(self.device), self.std.to(self.device)
        # A tensor, since a GPU multiplies by the reciprocal of a number, and that is not the same to the bit.
        self._largest = torch.tensor(255.0, device=self.device)
        self._stream: torch.cuda.Stream | None = None  # one for all epochs: the allocator keeps memory by stream

    def prepare(self, accelerator: Accelerator, memory_format: torch.memory_format = torch.contiguous_format) -> Self:
        """The same on the accelerator's device, with its share of each batch where there are several processes."""
        prepared = accelerator.prepare_data_loader(self.loader, device_placement=False)
        return self.on(accelerator.device, memory_format=memory_format, loader=prepared)

    def skip(self, count: int) -> Self:
        """The same without the first `count` batches, which are not read."""
        if not count:
            return self
        rest = skip_first_batches(self.loader, count)
        return self.on(self.device, memory_format=self.memory_format, loader=rest)

    def on(
        self,
        device: torch.device | str,
        *,
        memory_format: torch.memory_format = torch.contiguous_format,
        loader: Any = None,
    ) -> Self:
        """The same batches on another device."""
        numbers = self.mean.flatten().tolist(), self.std.flatten().tolist()
        chosen = self.loader if loader is None else loader  # not `or`: without batches it counts as false
        return type(self)(chosen, *numbers, device=device, memory_format=memory_format, ahead=self.ahead)

    @property
    def sampler(self) -> Iterable[Any]:
        """The order of the images; of training images the `Views`."""
        return self.loader.sampler

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self.ahead and self.device.type == "cuda":
            return self._one_ahead()
        return map(self.finish, self.loader)

    def _one_ahead(self) -> Iterator[tuple[Any, ...]]:
        self._stream = self._stream or torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        ready: tuple[Any, ...] | None = None
        for raw in self.loader:
            # What the steps so far have freed is written to again only after they have run.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                following = self.finish(raw)
            if ready is not None:
                yield ready
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            ready = following
        if ready is not None:
            yield ready

    def take(self, keys: Sequence[Any]) -> tuple[Any, ...]:
        """The batch of these images, by what the loader's sampler calls them."""
        return self.finish(self.loader.dataset.__getitems__(keys))  # type: ignore[attr-defined]

    def finish(self, raw: RawBatch) -> tuple[Any, ...]:
        """Move a batch to the device and normalise it there."""
        pixels = raw.pixels.to(self.device, non_blocking=True)
        images: Float[Tensor, "batch channels height width"]
        images = (
            pixels.to(torch.float32, memory_format=self.memory_format)
            .div_(self._largest)
            .sub_(self.mean)
            .div_(self.std)
        )
        if raw.erased is not None:
            images.masked_fill_(raw.erased.to(self.device, non_blocking=True), 0.0)
        target = raw.target.to(self.device, non_blocking=True)
        if raw.rows:
            rows = {name: [row.to(self.device, non_blocking=True) for row in part] for name, part in raw.rows.items()}
            return images, target, raw.position, rows
        return (images, target) if raw.position is None else (images, target, raw.position)


def worker_count(workers: int | str, batches: int) -> int:
    """The number of worker processes, at most one for each batch.

    `auto` takes the cores of a machine with a GPU, shared among its processes. On a CPU it takes none: the models use
    the cores, and small images are read in less time than is lost by waiting for a worker.
    """
    if workers != "auto":
        return min(int(workers), batches)
    if not torch.accelerator.is_available():
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(cores // processes, MOST_WORKERS, batches // FEWEST_BATCHES))

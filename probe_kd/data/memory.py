"""Images in memory: what a transform made of them, if their views repeat; otherwise the decoded images."""

import mmap
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from probe_kd.data.batches import Pixels
from probe_kd.errors import DataError

SAMPLE = 64  # images by which the size of all is estimated
T = TypeVar("T")


class PixelStore:
    """The pixels of every image in each of some views. A view is the seed from which a transform draws, or None.

    The memory is shared with the workers of a loader that are forked later, so each image is transformed once, by
    whichever process needs it first. Pages are taken as they are written. Workers that are not forked have one each.
    """

    def __init__(self, count: int, views: Sequence[int | None], example: Pixels) -> None:
        self._slots = {view: slot for slot, view in enumerate(views)}
        parts = {"pixels": example.pixels, "target": np.asarray(example.target)}
        if example.erased is not None:
            parts["erased"] = example.erased.numpy()
        self._fields = {name: ((len(views), count, *part.shape), part.dtype) for name, part in parts.items()}
        size = sum(prod(shape) * dtype.itemsize for shape, dtype in self._fields.values())
        which = f"{len(views)} views" if len(views) > 1 else "one view"
        check_room(size, f"{which} of {count} images", "fewer `views`, or a smaller `input_size`")
        self._allocate()

    def _allocate(self) -> None:
        self._is_there = _shared(self._fields["target"][0][:2], np.dtype(bool))
        self._arrays = {name: _shared(*field) for name, field in self._fields.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"_slots": self._slots, "_fields": self._fields}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._allocate()

    def find(self, index: int, view: int | None) -> Pixels | None:
        place = self._slots[view], index
        if not self._is_there[place]:
            return None
        rows = {name: array[place] for name, array in self._arrays.items()}
        target, erased = rows["target"], rows.get("erased")
        return Pixels(
            rows["pixels"],
            target if target.ndim else int(target),
            None if view is None else index,
            None if erased is None else torch.from_numpy(erased),
        )

    def keep(self, index: int, view: int | None, image: Pixels) -> None:
        place = self._slots[view], index
        for name, array in self._arrays.items():
            array[place] = getattr(image, name)
        self._is_there[place] = True  # last, since other workers look


class DecodedImages(Dataset[Any]):
    """The images of a data set, decoded once by `load`, in the memory of the process that forks the workers."""

    def __init__(self, images: Dataset[Any], mode: str) -> None:
        self.images, self.mode, self._decoded = images, mode, list[tuple[NDArray[np.uint8], Any]]()
        count = len(self)
        sizes = [self._decode(index)[0].nbytes for index in range(0, count, max(1, count // SAMPLE))]
        check_room(count * sum(sizes) // len(sizes), f"{count} decoded images", "a data set of smaller images")

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def load(self) -> None:
        """Decode all images, in threads. Raises DataError if one cannot be read."""
        if not self._decoded:
            with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
                self._decoded = list(threads.map(self._decode, range(len(self)), chunksize=SAMPLE))

    def _decode(self, index: int) -> tuple[NDArray[np.uint8], Any]:
        image, target = self.images[index]
        return np.asarray(image if image.mode == self.mode else image.convert(self.mode)), target

    def __getitem__(self, index: int) -> tuple[Image.Image, Any]:
        if not self._decoded:
            image, target = self.images[index]
            return image, target
        pixels, target = self._decoded[index]
        return Image.fromarray(pixels), target


# What was made of a data set lives as long as it, so that all models of a run see the same.
_MADE: WeakKeyDictionary[Dataset[Any], dict[Any, Any]] = WeakKeyDictionary()


def once(images: Dataset[Any], key: Any, make: Callable[[], T]) -> T:
    """Return what `make` returned for this data set and key before, or returns now."""
    made = _MADE.setdefault(images, {})
    if key not in made:
        made[key] = make()
    result: T = made[key]
    return result


def check_room(size: int, of_what: str, advice: str) -> None:
    """Raise DataError unless so many bytes are available."""
    available = psutil.virtual_memory().available
    if size > available:
        raise DataError(
            f"`memory: true` takes {size / 1e9:.3g} GB for {of_what}, and {available / 1e9:.3g} GB are available; "
            f"leave it out, or take {advice}"
        )


def _shared(shape: Sequence[int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Zeros in memory that is shared with the processes that are forked from now on."""
    size = max(1, prod(shape) * dtype.itemsize)
    return np.ndarray(tuple(shape), dtype, buffer=mmap.mmap(-1, size))

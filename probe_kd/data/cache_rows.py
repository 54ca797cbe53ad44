"""The rows of a teacher's cache: what is stored of an image, in which file, and how a loader reads it."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from probe_kd.data.row_files import SUM, RowFile, open_rows


@dataclass(frozen=True)
class Stored:
    """What is stored for one tap: its name, and the shape and dtype of one image's feature.

    With `top_k`, only the k largest logits are stored, and the logarithm of the summed exponentials of all.
    """

    tap: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    top_k: int | None = None

    @property
    def row(self) -> tuple[int, ...]:
        """The shape of what is written: for top-k logits, the values, their indices as numbers, and the normaliser."""
        return (2 * self.top_k + 1,) if self.top_k else self.shape

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of a stored row. Class indices need more than the 16 bits of a half-precision float."""
        return torch.float32 if self.top_k else self.dtype

    @property
    def bytes(self) -> int:
        """The stored bytes of one image."""
        return prod(self.row) * self.stored_dtype.itemsize


def shorten(logits: Tensor, k: int) -> Tensor:
    """(batch, classes) logits to (batch, 2k + 1): the k largest, their classes, and the normaliser of all."""
    logits = logits.float()
    values, classes = logits.topk(k)
    return torch.cat([values, classes.float(), logits.logsumexp(1, keepdim=True)], dim=1)


def lengthen(rows: Tensor, classes: int) -> Tensor:
    """The logits that `shorten` kept: the k largest as they were, and what probability is left shared out evenly.

    At temperature 1 the k classes have the teacher's own probabilities (Shen & Xing 2022, arXiv 2112.01528, call it
    marginal smoothing).
    """
    k = (rows.shape[1] - 1) // 2
    values, indices, total = rows[:, :k], rows[:, k : 2 * k].long(), rows[:, -1:]
    left = (1 - (values - total).exp().sum(1, keepdim=True)).clamp_min(1e-12)
    rest = total + left.log() - log(max(classes - k, 1))
    return rest.expand(-1, classes).scatter(1, indices, values)


def as_feature(tap: Stored, rows: Tensor) -> Tensor:
    """What a teacher gave, from the rows that are stored of it."""
    return lengthen(rows, tap.shape[-1]).to(tap.dtype) if tap.top_k else rows


def file_of(folder: Path, tap: Stored, view: int) -> Path:
    """The file of one tap and view in the folder of a cache."""
    name = tap.tap.replace("/", "_") or "output"
    return folder / (f"{name} top {tap.top_k}" if tap.top_k else name) / f"{view:06d}.safetensors"


def open_files(folder: Path, taps: Sequence[Stored], count: int, view: int, *, writes: bool) -> list[RowFile]:
    """Map the files of all taps of a view; empty unless all are there, as in a cache that another run begins."""
    files = [open_rows(file_of(folder, tap, view), count, tap.row, tap.stored_dtype, writes=writes) for tap in taps]
    opened = [file for file in files if file is not None]
    return opened if len(opened) == len(files) else []


@dataclass
class RowReader:
    """Reads the rows of one cache where a loader reads the images: in its workers, or in the process without workers.

    `views` are the numbers of the views by their seeds. The files are those that `TeacherCache` writes (`writes`), so
    that a row can be read as soon as its checksum is there.
    """

    folder: Path
    taps: Sequence[Stored]
    count: int
    writes: bool
    views: Mapping[int, int]
    _view: int = -1
    _files: list[RowFile] = field(default_factory=list)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_view": -1, "_files": []}  # a process that is not forked maps the files itself

    def __call__(self, indices: Sequence[int], view_seed: int) -> list[Tensor] | None:
        """The rows of these images at every tap; None unless all are there and intact.

        It changes nothing: the process that trains looks for itself then, and knows what it has not written yet.
        """
        chosen, files = torch.tensor(indices), self._opened(self.views.get(view_seed, -1))
        sums = [file.sums[chosen] for file in files]
        if not files or not all(bool(of_tap.all()) for of_tap in sums):
            return None
        rows = [file.rows[chosen] for file in files]
        intact = all(torch.equal(checksums(row), of_tap) for row, of_tap in zip(rows, sums, strict=True))
        return rows if intact else None

    def _opened(self, view: int) -> list[RowFile]:
        if view != self._view or not self._files:
            self._files = open_files(self.folder, self.taps, self.count, view, writes=self.writes)
            self._view = view
        return self._files


def checksums(rows: Tensor) -> Tensor:
    """(images, ...) to (images,): the CRC-32 of each row, and never 0, which says that there is none."""
    parts = rows.contiguous().flatten(1).view(torch.uint8).numpy() if rows.numel() else rows.numpy()
    return torch.tensor([zlib.crc32(part) or 1 for part in parts], dtype=SUM)

"""The outputs of a frozen teacher for every view of every image, stored on disk and replayed bit by bit.

A cache is a folder per teacher, images and augmentation (its key), in it a folder per tap, and in that a safetensors
file per view: the features of all images, row by row, which are mapped into memory, and one checksum per row, 0 where
the row is not there. The checksum is written only after the row has reached the disk, so a run that is killed leaves no
row that is half written; and it is compared whenever a row is read, so that a disk that gives back something else is
noticed. What a cache depends on is in its key: where any of it changes, so does the folder. Nothing in it depends on
where it lies, so that it can be moved and copied.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, prod
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from probe_kd.data.row_files import SUM, RowFile, create, metadata_of, open_rows, write_present
from probe_kd.errors import RunError
from probe_kd.files.atomic import to_disk
from probe_kd.files.run_folder import lock_file, unlock_file


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


@dataclass
class TeacherCache:
    """The cache of one phase: `find` what is there, `keep` what is not, `flush` at every checkpoint.

    `damaged` counts the rows that were not as they were written; they count as absent.
    `count` is the number of training images. Of several runs that use one folder at a time the first writes, and the
    others read what is there (`writes` is false) and ask their own teacher for the rest. `about` is the metadata of new
    files.
    """

    folder: Path
    taps: Sequence[Stored]
    count: int
    writes: bool = True
    about: Mapping[str, str] = field(default_factory=dict)
    damaged: int = 0
    _view: int = -1
    _files: list[RowFile] = field(default_factory=list)
    _fresh: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)  # indices and sums since the last flush
    _lock: IO[str] | None = None

    def lock(self) -> bool:
        """Whether this run is the one that writes; to be asked by one of its processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_file(self.folder / "lock")
        except OSError:  # of a file system without locks, where two runs might write, or one that is only read
            return False
        return self._lock is not None

    def prepare(self, view: int, view_seed: int | None = None) -> None:
        """Make room for a view, by one process. Raises RunError where the disk has none: never later, in a step."""
        for tap in self.taps:
            own = {"tap": tap.tap, "view": view, "view_seed": view_seed, "top_k": tap.top_k}
            about = {key: str(value) for key, value in {**own, **self.about}.items() if value is not None}
            try:
                create(self.path(tap, view), self.count, tap.row, tap.stored_dtype, about)
            except OSError as refusal:
                size = tap.bytes * self.count / 1e9
                raise RunError(
                    f"the teacher's cache in {self.folder} needs {size:.3g} GB for `{tap.tap}` of one view: "
                    f"{refusal.strerror}; make room, or set fewer `data.views` or `cache_top_k`"
                ) from None

    def begin(self, view: int) -> None:
        """An epoch begins that shows this view of every image, for which `prepare` made room."""
        self.flush()
        if view == self._view:
            return
        files = [
            open_rows(self.path(tap, view), self.count, tap.row, tap.stored_dtype, writes=self.writes)
            for tap in self.taps
        ]
        opened = [file for file in files if file is not None]
        # Not all are there in a cache that another run writes.
        self._view, self._files = (view, opened) if len(opened) == len(files) else (-1, [])

    def missing(self, view: int) -> Tensor:
        """The indices of the images of a view that are not there at every tap. Their rows are not read."""
        self.begin(view)
        return self._present().logical_not().nonzero().flatten()

    def _present(self) -> Tensor:
        """Whether each image of the view is there at every tap."""
        if not self._files:
            return torch.zeros(self.count, dtype=torch.bool)
        return torch.stack([file.sums for file in self._files]).bool().all(0)

    def find(self, indices: Tensor) -> list[Tensor] | None:
        """The features of these images at every tap, on the CPU, as they were written; None unless all are there."""
        if not self._files or not all(bool(file.sums[indices].all()) for file in self._files):
            return None
        features, intact = [], True
        for tap, file in zip(self.taps, self._files, strict=True):
            stored = file.rows[indices]
            mismatched = checksums(stored) != file.sums[indices]
            if mismatched.any():
                intact = False
                self.damaged += int(mismatched.sum())
                file.sums[indices[mismatched]] = 0
            features.append(self._as_feature(tap, stored))
        return features if intact else None

    def keep(self, indices: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Write the features of these images, one tensor per tap. Returns what `find` will give for them."""
        rows = [
            shorten(feature, tap.top_k) if tap.top_k else feature.detach()
            for tap, feature in zip(self.taps, features, strict=True)
        ]
        if self.writes and self._files:
            rows_here = [row.cpu() for row in rows]
            for file, row in zip(self._files, rows_here, strict=True):
                file.rows[indices] = row
            self._fresh.append((indices, [checksums(row) for row in rows_here]))
        return [self._as_feature(tap, row) for tap, row in zip(self.taps, rows, strict=True)]

    @staticmethod
    def _as_feature(tap: Stored, rows: Tensor) -> Tensor:
        return lengthen(rows, tap.shape[-1]).to(tap.dtype) if tap.top_k else rows

    def flush(self) -> None:
        """Write new rows to the disk, and only then their checksums, which mark them as present."""
        if not self._fresh:
            return
        paths = [self.path(tap, self._view) for tap in self.taps]
        for path in paths:
            to_disk(path)
        for indices, sums_of_taps in self._fresh:
            for file, sums in zip(self._files, sums_of_taps, strict=True):
                file.sums[indices] = sums
        for path, file in zip(paths, self._files, strict=True):
            write_present(path, int(file.sums.count_nonzero()))
        self._fresh = []

    def some(self, view: int, most: int) -> tuple[Tensor, list[Tensor]]:
        """(indices, features at every tap) of at most `most` images that are stored."""
        self.begin(view)
        while self._files:
            indices = self._present().nonzero().flatten()[:most]
            features = self.find(indices)
            if features is not None:  # else some were damaged, and count as absent now
                return indices, features
        return torch.zeros(0, dtype=torch.long), []

    def close(self) -> None:
        self.flush()
        self._view, self._files = -1, []
        if self._lock is not None:
            unlock_file(self._lock)
            self._lock = None

    def path(self, tap: Stored, view: int) -> Path:
        """The file of one tap and view."""
        name = tap.tap.replace("/", "_") or "output"
        folder = self.folder / (f"{name} top {tap.top_k}" if tap.top_k else name)
        return folder / f"{view:06d}.safetensors"

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of one of the files; empty if there is none."""
        first = next(iter(sorted(self.folder.glob("*/*.safetensors"))), None)
        return metadata_of(first) if first else {}


def checksums(rows: Tensor) -> Tensor:
    """(images, ...) to (images,): the CRC-32 of each row, and never 0, which says that there is none."""
    parts = rows.contiguous().flatten(1).view(torch.uint8).numpy() if rows.numel() else rows.numpy()
    return torch.tensor([zlib.crc32(part) or 1 for part in parts], dtype=SUM)

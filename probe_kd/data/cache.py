"""The outputs of a frozen teacher for every view of every image, stored on disk and replayed bit by bit.

A cache is a folder per teacher, images and augmentation (its key), in it a folder per tap, and in that two files per
view: the features of all images, row by row, which are mapped into memory, and one checksum per row, 0 where the row is
not there. The checksum is written only after the row has reached the disk, so a run that is killed leaves no row that
is half written; and it is compared whenever a row is read, so that a disk that gives back something else is noticed.
What a cache depends on is in its key: where any of it changes, so does the folder.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from math import log, prod
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from probe_kd.data.label_sets import MultiHotImages
from probe_kd.errors import DataError, RunError
from probe_kd.files.atomic import to_disk
from probe_kd.files.run_folder import lock_file, unlock_file

SUM = torch.int64  # of checksums, which need 33 bits as signed numbers
FORMAT = 2  # changes if the format of rows does, or what an adapter of the same name computes


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
    others read what is there (`writes` is false) and ask their own teacher for the rest.
    """

    folder: Path
    taps: Sequence[Stored]
    count: int
    writes: bool = True
    damaged: int = 0
    _view: int = -1
    _rows: list[Tensor] = field(default_factory=list)
    _sums: list[Tensor] = field(default_factory=list)
    _fresh: list[tuple[Tensor, list[Tensor]]] = field(default_factory=list)  # indices and sums since the last flush
    _lock: IO[str] | None = None

    def lock(self) -> bool:
        """Whether this run is the one that writes; to be asked by one of its processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = lock_file(self.folder / "lock")
        except OSError:  # of a file system without locks, where two runs might write
            return False
        return self._lock is not None

    def prepare(self, view: int) -> None:
        """Make room for a view, by one process. Raises RunError where the disk has none: never later, in a step."""
        for tap in self.taps:
            rows, sums = self._files(tap, view)
            rows.parent.mkdir(parents=True, exist_ok=True)
            try:
                _reserve(rows, tap.bytes * self.count)
                _reserve(sums, SUM.itemsize * self.count)
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
        files = [self._files(tap, view) for tap in self.taps]
        if not all(file.exists() for pair in files for file in pair):  # of a cache that another run writes
            self._view, self._rows, self._sums = -1, [], []
            return
        self._view = view
        self._rows = [
            torch.from_file(str(rows), shared=True, size=self.count * prod(tap.row), dtype=tap.stored_dtype).view(
                self.count, *tap.row
            )
            for tap, (rows, _) in zip(self.taps, files, strict=True)
        ]
        self._sums = [torch.from_file(str(sums), shared=True, size=self.count, dtype=SUM) for _, sums in files]

    def find(self, indices: Tensor) -> list[Tensor] | None:
        """The features of these images at every tap, on the CPU, as they were written; None unless all are there."""
        if not self._sums or not all(bool(sums[indices].all()) for sums in self._sums):
            return None
        features, intact = [], True
        for tap, rows, sums in zip(self.taps, self._rows, self._sums, strict=True):
            stored = rows[indices]
            mismatched = checksums(stored) != sums[indices]
            if mismatched.any():
                intact = False
                self.damaged += int(mismatched.sum())
                sums[indices[mismatched]] = 0
            features.append(self._as_feature(tap, stored))
        return features if intact else None

    def keep(self, indices: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Write the features of these images, one tensor per tap. Returns what `read` will give for them."""
        rows = [
            shorten(feature, tap.top_k) if tap.top_k else feature.detach()
            for tap, feature in zip(self.taps, features, strict=True)
        ]
        if self.writes and self._rows:
            rows_here = [row.cpu() for row in rows]
            for place, row in zip(self._rows, rows_here, strict=True):
                place[indices] = row
            self._fresh.append((indices, [checksums(row) for row in rows_here]))
        return [self._as_feature(tap, row) for tap, row in zip(self.taps, rows, strict=True)]

    @staticmethod
    def _as_feature(tap: Stored, rows: Tensor) -> Tensor:
        return lengthen(rows, tap.shape[-1]).to(tap.dtype) if tap.top_k else rows

    def flush(self) -> None:
        """Write new rows to the disk, and only then their checksums, which mark them as present."""
        if not self._fresh:
            return
        files = [self._files(tap, self._view) for tap in self.taps]
        for rows, _ in files:
            to_disk(rows)
        for indices, sums_of_taps in self._fresh:
            for place, sums in zip(self._sums, sums_of_taps, strict=True):
                place[indices] = sums
        self._fresh = []

    def some(self, view: int, most: int) -> tuple[Tensor, list[Tensor]]:
        """(indices, features at every tap) of at most `most` images that are stored."""
        self.begin(view)
        while self._sums:
            indices = torch.stack(self._sums).bool().all(0).nonzero().flatten()[:most]
            features = self.find(indices)
            if features is not None:  # else some were damaged, and count as absent now
                return indices, features
        return torch.zeros(0, dtype=torch.long), []

    def close(self) -> None:
        self.flush()
        self._rows, self._sums = [], []
        if self._lock is not None:
            unlock_file(self._lock)
            self._lock = None

    def _files(self, tap: Stored, view: int) -> tuple[Path, Path]:
        name = tap.tap.replace("/", "_") or "output"
        folder = self.folder / (f"{name} top {tap.top_k}" if tap.top_k else name)
        return folder / f"{view:06d}.rows", folder / f"{view:06d}.sums"


def checksums(rows: Tensor) -> Tensor:
    """(images, ...) to (images,): the CRC-32 of each row, and never 0, which says that there is none."""
    parts = rows.contiguous().flatten(1).view(torch.uint8).numpy() if rows.numel() else rows.numpy()
    return torch.tensor([zlib.crc32(part) or 1 for part in parts], dtype=SUM)


def _reserve(path: Path, size: int) -> None:
    """Reserve disk space for the whole file, since writing to a mapped file on a full disk kills the process."""
    if path.exists() and path.stat().st_size == size:
        return
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(handle, 0, size)
    except OSError:
        path.unlink()
        raise
    finally:
        os.close(handle)


def key_of(teacher: nn.Module, images: Dataset[Any], about: Mapping[str, Any]) -> tuple[str, str]:
    """(the name of the folder, what it depends on as JSON): weights, images, versions, and what `about` says."""
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "pillow")}
    depends = {
        "format": FORMAT,
        "teacher": _digest(_bytes_of(tensor) for tensor in _named(teacher)),
        "images": fingerprint(images),
        "versions": versions,
        **about,
    }
    text = json.dumps(depends, indent=1, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16], text


def fingerprint(images: Dataset[Any]) -> str:
    """A digest of the images and their order: of the names, sizes and times of all files, or of all pixels.

    It always includes the pixels of some images. Without files or pixels in memory, it has nothing else.
    """
    if isinstance(images, Subset):
        return _digest([fingerprint(images.dataset).encode(), repr(list(images.indices)).encode()])
    if isinstance(images, MultiHotImages):  # no teacher sees the labels
        return fingerprint(images.images)
    count = len(images)  # type: ignore[arg-type]
    parts = [str(count).encode()]
    inner = getattr(images, "images", images)
    if hasattr(images, "samples"):
        parts += [_stat(path, target) for path, target in images.samples]
    elif hasattr(inner, "data"):
        targets = torch.as_tensor(getattr(inner, "targets", ()))  # 60,000 numbers one by one take six seconds
        parts += [_bytes_of(torch.as_tensor(inner.data)), _bytes_of(targets)]
    parts += [_stat(str(path), None) for path in getattr(images, "files", ())]  # of shards
    for index in range(0, count, max(1, count // 64)):
        try:
            image, target = images[index]
        except DataError:  # it may be one that the recipe leaves out
            continue
        parts += [image.tobytes(), str(target).encode()]
    return _digest(parts)


def _stat(path: str, target: Any) -> bytes:
    try:
        status = os.stat(path)
    except OSError:  # inside an archive
        return f"{path} {target}".encode()
    return f"{path} {target} {status.st_size} {status.st_mtime_ns}".encode()


def _named(module: nn.Module) -> Iterable[Tensor]:
    return (tensor for _, tensor in sorted(module.state_dict().items()))


def _bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()

"""The outputs of a frozen teacher for every view of every image, stored on disk and replayed bit by bit.

A cache is a folder per teacher, images and augmentation (its key), in it a folder per tap, and in that a safetensors
file per view: the features of all images, row by row, which are mapped into memory, and one checksum per row, 0 where
the row is not there. The checksum is written only after the row has reached the disk, so a run that is killed leaves no
row that is half written; and it is compared whenever a row is read, so that a disk that gives back something else is
noticed. What a cache depends on is in its key: where any of it changes, so does the folder. Nothing in it depends on
where it lies, so that it can be moved and copied.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from probe_kd.data.cache_rows import Stored, as_feature, checksums, file_of, open_files, shorten
from probe_kd.data.row_files import RowFile, create, metadata_of, write_present
from probe_kd.errors import RunError, short
from probe_kd.files.atomic import to_disk
from probe_kd.files.run_folder import lock_file, unlock_file

MOST_BEHIND = 4  # batches that wait in memory until they are written
Written = list[tuple[Tensor, Tensor]]  # the indices and checksums of the rows of a batch, by tap


@dataclass
class TeacherCache:
    """The cache of one phase: `find` what is there, `keep` what is not, `flush` at every checkpoint.

    What is kept is written behind, by a thread, and counts as absent until it is flushed: so no row is read while it
    is written, and training waits for neither checksums nor the disk.

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
    _behind: list[Future[Written]] = field(default_factory=list)  # what was kept since the last flush
    _thread: ThreadPoolExecutor | None = None  # from the first row that is kept until the next flush
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
        self._files = open_files(self.folder, self.taps, self.count, view, writes=self.writes)
        self._view = view if self._files else -1

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
        rows = self.rows(indices)
        return None if rows is None else self.features(rows)

    def rows(self, indices: Tensor) -> list[Tensor] | None:
        """What is stored of these images at every tap; None unless all are there."""
        if not self._files or not all(bool(file.sums[indices].all()) for file in self._files):
            return None
        rows, intact = [], True
        for file in self._files:
            stored = file.rows[indices]
            mismatched = checksums(stored) != file.sums[indices]
            if mismatched.any():
                intact = False
                self.damaged += int(mismatched.sum())
                file.sums[indices[mismatched]] = 0
            rows.append(stored)
        return rows if intact else None

    def features(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The features at every tap from what is stored of them, on any device."""
        return [as_feature(tap, row) for tap, row in zip(self.taps, rows, strict=True)]

    def keep(self, indices: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """Write the features of these images, one tensor per tap. Returns what `find` will give for them.

        Raises RunError if what was kept before could not be written.
        """
        rows = [
            shorten(feature, tap.top_k) if tap.top_k else feature.detach()
            for tap, feature in zip(self.taps, features, strict=True)
        ]
        if self.writes and self._files:
            self._write_behind(indices, rows)
        return self.features(rows)

    def _write_behind(self, indices: Tensor, rows: Sequence[Tensor]) -> None:
        """Leave rows that are absent to the thread. It gets copies, because the step may overwrite a feature."""
        if len(self._behind) >= MOST_BEHIND:
            self._result(self._behind[-MOST_BEHIND])
        absent = [(file.sums[indices] == 0).nonzero().flatten() for file in self._files]
        copies = [row.to("cpu", non_blocking=True, copy=True) for row in rows]
        copied = None
        if rows[0].is_cuda:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(rows[0].device))
        self._thread = self._thread or ThreadPoolExecutor(1, "cache")
        self._behind.append(self._thread.submit(_written, self._files, indices, absent, copies, copied))

    def _result(self, behind: Future[Written]) -> Written:
        try:
            return behind.result()
        except Exception as refusal:  # of mapped memory there is none that one could name
            raise RunError(f"cannot write the teacher's cache in {self.folder}: {short(refusal)}") from refusal

    def flush(self) -> None:
        """Write new rows to the disk, and only then their checksums, which mark them as present.

        Raises RunError if they could not be written. They are computed again then.
        """
        if self._thread is not None:
            # No thread is left when workers of a loader are forked.
            self._thread.shutdown()
            self._thread = None
        behind, self._behind = self._behind, []
        written = [self._result(batch) for batch in behind]
        if not written:
            return
        paths = [self.path(tap, self._view) for tap in self.taps]
        for path in paths:
            to_disk(path)
        for batch in written:
            for file, (indices, sums) in zip(self._files, batch, strict=True):
                file.sums[indices] = sums
        for path, file in zip(paths, self._files, strict=True):
            write_present(path, int(file.sums.count_nonzero()))

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
        return file_of(self.folder, tap, view)

    @property
    def metadata(self) -> dict[str, str]:
        """The metadata of one of the files; empty if there is none."""
        return next(self.all_metadata(), {})

    def all_metadata(self) -> Iterator[dict[str, str]]:
        """The metadata of every file."""
        return map(metadata_of, sorted(self.folder.glob("*/*.safetensors")))


def _written(
    files: Sequence[RowFile], indices: Tensor, absent: Sequence[Tensor], rows: Sequence[Tensor], copied: Any
) -> Written:
    """Write the rows at the places that are absent, one tensor per tap, into the mapped files."""
    if copied is not None:
        copied.synchronize()
    batch = []
    for file, places, row in zip(files, absent, rows, strict=True):
        new = row if len(places) == len(row) else row[places]
        file.rows[indices[places]] = new
        batch.append((indices[places], checksums(new)))
    return batch

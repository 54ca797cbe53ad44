"""Data sets in CSV files: `path,label[,label...]`, one image a row."""

import csv
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from stat import S_ISREG
from typing import NamedTuple

import numpy as np

from probe_kd.data.digests import printable
from probe_kd.data.images import EXTENSIONS, FolderImages, natural_order
from probe_kd.data.label_sets import LabelSets
from probe_kd.data.names import CSV, EVALUATED, TRAINED
from probe_kd.data.options import DataOptions
from probe_kd.data.split import Split, quoted
from probe_kd.errors import DataError, nearest

_HEADERS = (
    "path",
    "paths",
    "file",
    "filename",
    "file_name",
    "filepath",
    "image",
    "images",
    "image_path",
    "img",
    "name",
)
MOST_BYTES = 2_000_000_000  # of one file: some 30 million images


class _Row(NamedTuple):
    line: int
    path: str
    labels: tuple[str, ...]


def _base_of(options: DataOptions) -> Path:
    """The CSV file of the training images, or the folder of those of all splits."""
    inner = options.dataset.partition("/")[2] if options.dataset else ""
    if not (options.root and inner):
        return Path(options.root or inner)
    below = Path(options.root, inner.lstrip(os.sep))
    moved = Path(options.root, os.path.basename(inner))  # `eval --root` names the folder of the file
    return moved if moved.exists() and not below.exists() else below


def csv_file(options: DataOptions, key: str, split: str) -> Path:
    """The CSV file of a split. Raises DataError if there is none."""
    base = _base_of(options)
    if not base.is_dir():
        if key == "train_split" and not split.lower().endswith(CSV):
            return base
        base = base.parent
    synonyms = TRAINED if split in TRAINED else EVALUATED if split in EVALUATED else ()
    names = [split] if split.lower().endswith(CSV) else [f"{name}{CSV}" for name in (split, *synonyms)]
    existing = next((base / name for name in names if (base / name).exists()), None)
    if existing is None:
        others = sorted(file.name for file in base.glob(f"*{CSV}"))
        listing = f"there are {quoted(others)}{nearest(names[0], others)}" if others else "it has no CSV files"
        raise DataError(
            f"there is no file {names[0]!r} in {str(base)!r} for `{key}`: {listing}; name one of them"
            + (", or hold training images out: `val_split: none` with `holdout: 0.1`" if key != "train_split" else ""),
            key,
        )
    return existing


def open_csv(options: DataOptions, key: str, split: str) -> Split:
    """Open a split that a CSV file lists. Paths are relative to the folder of the file, and may lead out of it.

    Raises DataError for a file that is no CSV in UTF-8, for images that are not there (unless `on_error: skip` leaves
    them out), and for rows with another number of labels than `labels` says.
    """
    file = csv_file(options, key, split)
    rows, notes = _without_header(file, [*_rows(file, key)])
    if not rows:
        raise DataError(f"there are no images in {file}; a row is `path,label`", key)
    root = str(file.parent)
    if options.on_error == "raise":
        _check_files(file, rows, key)
    _check_labels(file, rows, options.labels, key)
    labels, more_notes = _labels_by_path(file, rows, options.labels, key)
    names = tuple(sorted({label for of_image in labels.values() for label in of_image}, key=natural_order))
    number = {name: index for index, name in enumerate(names)}
    sets = [[number[label] for label in of_image] for of_image in labels.values()]
    targets = [of_image[0] if options.labels == "class" else 0 for of_image in sets]
    return Split(
        key=key,
        name=split,
        images=FolderImages([*zip(labels, targets, strict=True)], options.mode, root, draft=options.draft),
        names=names,
        sources=frozenset({os.path.realpath(file)}),
        targets=np.array(targets) if options.labels == "class" else None,
        notes=(*notes, *more_notes),
        linked=True,  # files that two lists have in common are looked for
        labelled=options.labels != "none",
        sets=LabelSets.of(sets) if options.labels == "multilabel" else None,
    )


def _rows(file: Path, key: str) -> Iterator[_Row]:
    """The rows that are not empty, a header too. Raises DataError for what is no CSV."""
    try:
        _check_size(file, key)
        with file.open("rb") as binary, TextIOWrapper(binary, encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, skipinitialspace=True, strict=True)
            for cells in reader:
                path, *labels = (cell.strip() for cell in cells) if cells else [""]
                if not path and not any(labels):
                    continue
                if not path:
                    raise DataError(f"line {reader.line_num} of {file} has labels and no path", key)
                yield _Row(
                    reader.line_num,
                    os.path.normpath(os.path.join(file.parent, path)),
                    tuple(unicodedata.normalize("NFC", label) for label in labels if label),  # as names of folders
                )
    except OSError as refusal:
        raise DataError(f"cannot read {file}: {refusal.strerror}", key) from None
    except UnicodeDecodeError:
        raise DataError(f"{file} is no UTF-8 text; save it as UTF-8", key) from None
    except csv.Error as refusal:
        raise DataError(f"{file} is no CSV: line {reader.line_num}: {refusal}", key) from None


def _check_size(file: Path, key: str) -> None:
    status = file.stat()
    if not S_ISREG(status.st_mode):  # nobody waits for a FIFO
        raise DataError(f"{file} is no CSV: it is no regular file", key)
    if status.st_size > MOST_BYTES:
        raise DataError(f"{file} is larger than {MOST_BYTES // 1_000_000} MB", key)


def _without_header(file: Path, rows: list[_Row]) -> tuple[list[_Row], list[str]]:
    """The rows without a first one that names columns, and a note on it if its name for the paths is unusual."""
    if not rows or os.path.isfile(rows[0].path) or rows[0].path.lower().endswith(EXTENSIONS):
        return rows, []
    name = os.path.basename(rows[0].path)
    if name.lower() in _HEADERS:
        return rows[1:], []
    return rows[1:], [f"line {rows[0].line} of {file} is read as a header: {printable(name)!r} is no image"]


def _check_files(file: Path, rows: Sequence[_Row], key: str) -> None:
    missing = [row for row in rows if not os.path.isfile(row.path)]
    if not missing:
        return
    first = missing[0]
    are = "are not files" if os.path.exists(first.path) else "are not there"
    separated = next((name for name, mark in (("semicolons", ";"), ("tabs", "\t")) if mark in first.path), "")
    advice = (
        f"its columns are separated by {separated}: separate them by commas"
        if separated
        else f"paths are relative to {file.parent}; mend it, or leave such images out by `data: {{on_error: skip}}`"
    )
    raise DataError(
        f"{len(missing)} of {len(rows)} images of {file} {are}, the first in line {first.line}: "
        f"{printable(first.path)!r}; {advice}",
        key,
    )


def _check_labels(file: Path, rows: Sequence[_Row], labels: str, key: str) -> None:
    if labels == "class":
        wrong = next((row for row in rows if len(row.labels) != 1), None)
        if wrong is None:
            return
        advice = "`labels: multilabel` is for several labels an image" if wrong.labels else "`labels: none` needs none"
        raise DataError(
            f"line {wrong.line} of {file} has {len(wrong.labels) or 'no'} label{'s' * (len(wrong.labels) > 1)}, and an "
            f"image has one class; {advice}",
            key,
        )
    if labels == "multilabel":
        cells = {label for row in rows for label in row.labels}
        if not cells:
            raise DataError(f"no image of {file} has a label; a row is `path,label,label`", key)
        repeats = any(len({*row.labels}) < len(row.labels) for row in rows)
        if cells <= {"0", "1"} and (repeats or all(len(row.labels) > 1 for row in rows)):
            raise DataError(
                f"the labels in {file} are 0 and 1 in several columns; name the labels that each image has instead, as "
                "in `a.png,cat,outdoors`",
                key,
            )


def _labels_by_path(
    file: Path, rows: Sequence[_Row], labels: str, key: str
) -> tuple[Mapping[str, tuple[str, ...]], list[str]]:
    """The labels of every image, and notes on images in several rows. Raises DataError if these contradict."""
    found: dict[str, tuple[str, ...]] = {}
    repeated = 0
    for row in rows:
        own = () if labels == "none" else row.labels
        before = found.get(row.path)
        if before is not None:
            repeated += 1
            if labels == "class" and before != own:
                raise DataError(
                    f"{file} gives {printable(row.path)!r} two classes, {before[0]!r} and in line {row.line} {own[0]!r}"
                    "; "
                    "`labels: multilabel` is for several labels an image",
                    key,
                )
        found[row.path] = tuple(dict.fromkeys((*(before or ()), *own)))
    added = ", and have the labels of all" if labels == "multilabel" else ""
    note = f"{repeated} rows of {file} repeat an image of another row; such images count once{added}"
    return found, [note] * bool(repeated)

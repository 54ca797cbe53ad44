"""Images that two splits have in common: an error, or a note."""

import filecmp
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace

from probe_kd.data.digests import spread
from probe_kd.data.images import FolderImages
from probe_kd.data.split import Split, quoted
from probe_kd.errors import DataError


def overlap(one: Split, two: Split) -> bool:
    """Whether two splits share a source, a file, or a row of a table, or the folder of one contains the other's."""
    if one.sources & two.sources:
        return True
    if len(one.sources) == len(two.sources) == 1:
        (first,), (second,) = one.sources, two.sources
        if first.startswith(second + os.sep) or second.startswith(first + os.sep):
            return True
    if (one.linked or two.linked) and not _real_files(one).isdisjoint(_real_files(two)):
        return True
    return any(
        part == other and max(start, begin) < min(stop, end)
        for part, start, stop in one.rows
        for other, begin, end in two.rows
    )


def _real_files(split: Split) -> set[str]:
    samples = split.images.samples if isinstance(split.images, FolderImages) else ()
    return {os.path.realpath(path) for path, _ in samples}


def with_note_of_copies(split: Split, train: Split) -> Split:
    """The split, with a note if some of its images are also training images. Raises DataError if all are.

    Up to 100 images of a folder are compared with the training images of the same name and class. Hard links are
    compared with all training images.
    """
    if not isinstance(split.images, FolderImages):
        return split
    compared = spread(split.images.samples, 100)
    copies = [os.path.relpath(path, split.images.root) for path in _copies(compared, split.names, train)]
    if not copies:
        return split
    share = f"{len(copies)} of {len(compared)}"
    if len(copies) == len(compared):
        raise DataError(
            f"{split.label} is a copy of the training images: {share} images that were compared are the same bytes as "
            f"in {train.label} ({copies[0]}, ...), and no figure of images that were trained on means anything; name "
            "other images, or hold some out: `val_split: none` with `holdout: 0.1`",
            split.key,
        )
    note = f"{share} sampled images of {split.label} are also training images, the same bytes: {quoted(copies, 3)}"
    return replace(split, notes=(*split.notes, note))


def shared_with_training(split: Split, train: Split) -> str:
    """How many images of a split of another data set a run trains on, in a sentence; empty if none are found.

    Files and rows are compared as by `overlap`, and the bytes of up to 100 images as by `with_note_of_copies`.
    """
    if overlap(split, train):
        return f"{split.label} has images that the run trains on"
    compared = spread(split.images.samples, 100) if isinstance(split.images, FolderImages) else []
    copies = _copies(compared, split.names, train)
    if not copies:
        return ""
    return f"{len(copies)} of {len(compared)} sampled images of {split.label} are images that the run trains on"


def _copies(compared: Sequence[tuple[str, int]], names: Sequence[str], train: Split) -> list[str]:
    """The paths that are also training images: the same name, class and bytes, or a hard link."""
    if not isinstance(train.images, FolderImages):
        return []
    by_class = bool(names) and train.labelled
    compared_names = {os.path.basename(path) for path, _ in compared}
    train_paths: dict[tuple[str, str], list[str]] = {}
    for path, target in train.images.samples:
        name = path.rpartition(os.sep)[2]
        if name in compared_names:
            label = train.names[target] if by_class else ""
            train_paths.setdefault((label, name), []).append(path)
    inode_of = _inodes_of_hard_links(path for path, _ in compared)
    linked = set(_inodes_of_hard_links(path for path, _ in train.images.samples).values()) if inode_of else set()
    return [
        path
        for path, target in compared
        if any(
            _same_bytes(path, other)
            for other in train_paths.get((names[target] if by_class else "", os.path.basename(path)), ())[:20]
        )
        or inode_of.get(path) in linked
    ]


def _inodes_of_hard_links(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(device, inode) of each path that is one of several hard links to a file."""
    inodes = {}
    for path in paths:
        with suppress(OSError):
            status = os.stat(path)
            if status.st_nlink > 1:
                inodes[path] = status.st_dev, status.st_ino
    return inodes


def _same_bytes(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other) or (
            os.path.getsize(path) > 0 and filecmp.cmp(path, other, shallow=False)  # reads regular files only
        )
    except OSError:
        return False

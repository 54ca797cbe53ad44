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
    """Whether two splits have a source or a row of a table in common, or one's folder lies in the other's."""
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
    """The split, with a note where some of its images are training images too. Raises DataError where all are.

    Of a folder, up to 100 images are compared with what has their name and class among the training images, and, where
    they are hard links, with all of these.
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


def _copies(compared: Sequence[tuple[str, int]], names: Sequence[str], train: Split) -> list[str]:
    """Those of these images that lie in the training split too: of one name, class and bytes, or hard links."""
    if not isinstance(train.images, FolderImages):
        return []
    wanted = {os.path.basename(path) for path, _ in compared}
    there: dict[tuple[str, str], list[str]] = {}
    for path, target in train.images.samples:
        name = path.rpartition(os.sep)[2]
        if name in wanted:
            there.setdefault((train.names[target], name), []).append(path)
    file_of = _files_of_several_names(path for path, _ in compared)
    linked = set(_files_of_several_names(path for path, _ in train.images.samples).values()) if file_of else set()
    return [
        path
        for path, target in compared
        if any(_same_bytes(path, other) for other in there.get((names[target], os.path.basename(path)), ())[:20])
        or file_of.get(path) in linked
    ]


def _files_of_several_names(paths: Iterable[str]) -> dict[str, tuple[int, int]]:
    """By the paths, which files they are names of (hard links), of those that have more names than one."""
    found = {}
    for path in paths:
        with suppress(OSError):
            about = os.stat(path)
            if about.st_nlink > 1:
                found[path] = about.st_dev, about.st_ino
    return found


def _same_bytes(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other) or (
            os.path.getsize(path) > 0 and filecmp.cmp(path, other, shallow=False)  # which reads regular files only
        )
    except OSError:
        return False

"""Digests of the splits of a run, in a few kilobytes: they reveal changed images, even if the data were moved.

Names, sizes and classes of all images, and no times: data may be moved and copied. It takes one `stat` per file, a
second for 100,000 files on two busy cores with a local disk. The contents of a few are read too, since images without
compression have one size; two such images that change places and are none of these few are not noticed.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, TypeVar

from torch.utils.data import Dataset

from probe_kd.data.shards import Shards
from probe_kd.errors import DataError
from probe_kd.files.atomic import digest_of

NAMED = 2000  # images; of larger splits no names are stored, so only a class can be named
LOOKED_INTO = 64
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Contents:
    """The contents of a split: for each part its number of images and a digest of names and sizes.

    A part is a class, a folder of images without classes, or a shard. `files` are the sizes of all images by name, if
    there are few, and `looked_into` digests of the contents of a few.
    """

    kind: Literal["class", "folder", "shard"]
    parts: dict[str, tuple[int, str]]
    files: dict[str, int] = field(default_factory=dict)
    looked_into: dict[str, str] = field(default_factory=dict)

    def difference(self, current: "Contents") -> str:
        """What has changed, in words, naming one image if names are stored; empty if nothing has."""
        changes = _file_changes(self.files, current.files) if self.files and current.files else []
        changes = changes or [*_part_changes(self, current)]
        if not changes and list(self.parts) != list(current.parts):
            changes = [f"the {_plural(self.kind)} come in another order"]
        other = [name for name, digest in current.looked_into.items() if self.looked_into.get(name, digest) != digest]
        return ", ".join(changes or ([f"{_one_of(other)} has other contents"] if other else []))


def _file_changes(before: Mapping[str, int], current: Mapping[str, int]) -> list[str]:
    gone, new = [name for name in before if name not in current], [name for name in current if name not in before]
    other = [name for name, size in current.items() if before.get(name, size) != size]
    changes = [f"{_one_of(gone)} is not there any more"] if gone else []
    changes += [f"{_one_of(new)} is new"] if new else []
    changes += [f"{_one_of(other)} has {current[other[0]]} bytes and had {before[other[0]]}"] if other else []
    return changes


def _part_changes(before: Contents, current: Contents) -> Iterable[str]:
    """The change of the first part that differs."""
    kind = current.kind
    for name in [*before.parts, *current.parts]:
        (earlier_count, earlier_digest), (count, digest) = (
            before.parts.get(name, (0, "")),
            current.parts.get(name, (0, "")),
        )
        if name not in current.parts:
            yield f"{kind} {name!r} is not there any more ({earlier_count} images)"
        elif name not in before.parts:
            yield f"{kind} {name!r} is new ({count} images)"
        elif earlier_count != count:
            subject = f"{kind} {name!r} has" if name else "it has"
            yield f"{subject} {count} images and had {earlier_count}"
        elif digest != earlier_digest:
            yield f"{kind} {name!r} has other images, as many as before" if name else "it has other images"
        else:
            continue
        return


def _one_of(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _plural(kind: str) -> str:
    return {"class": "classes", "folder": "folders", "shard": "shards"}[kind]


def of_unlabelled_files(paths: Sequence[str], root: str) -> Contents:
    """Contents of image files without classes: their parts are the outermost folders in `root`."""
    names = _names_in(root, paths)
    folders = [printable(name.partition(os.sep)[0]) if os.sep in name else "." for name in names]
    return replace(of_files([*zip(paths, folders, strict=True)], root), kind="folder")


def of_sets_of_files(paths: Sequence[str], labels: Sequence[Sequence[str]], root: str) -> Contents:
    """Contents of image files with any number of labels: their parts are the classes, and `""` of images without."""
    keys = [
        os.fsencode(f"{name}\0{size}\0") for name, size in zip(_names_in(root, paths), sizes_of(paths), strict=True)
    ]
    contents = of_unlabelled_files(paths, root)
    return replace(contents, kind="class", parts=_parts_of_sets(keys, labels))


def of_sets_of_images(images: Dataset[Any], labels: Sequence[Sequence[str]]) -> Contents:
    """Contents of images without files that have any number of labels."""
    keys = [f"{index}\0".encode() for index in range(len(labels))]
    return replace(of_images(images, []), parts=_parts_of_sets(keys, labels))


def _parts_of_sets(keys: Sequence[bytes], labels: Sequence[Sequence[str]]) -> dict[str, tuple[int, str]]:
    digests: dict[str, Any] = {}
    counts: dict[str, int] = {}
    for key, of_image in zip(keys, labels, strict=True):
        for label in of_image or [""]:
            counts[label] = counts.get(label, 0) + 1
            digests.setdefault(label, blake2b(digest_size=8)).update(key)
    return {label: (counts[label], digests[label].hexdigest()) for label in sorted(digests)}


def of_files(files: Sequence[tuple[str, str]], root: str) -> Contents:
    """Contents of image files below `root`: `files` are (path, class name), in an order that depends on names alone."""
    names = _names_in(root, [path for path, _ in files])
    digests: dict[str, Any] = {}
    counts: dict[str, int] = {}
    sizes = sizes_of([path for path, _ in files])
    for name, size, (_, label) in zip(names, sizes, files, strict=True):
        counts[label] = counts.get(label, 0) + 1
        digests.setdefault(label, blake2b(digest_size=8)).update(os.fsencode(f"{name}\0{size}\0"))
    looked_into = {
        printable(names[index]): _digest_of_file(files[index][0]) for index in spread(range(len(files)), LOOKED_INTO)
    }
    return Contents(
        "class",
        {label: (counts[label], digest.hexdigest()) for label, digest in digests.items()},
        {printable(name): size for name, size in zip(names, sizes, strict=True)} if len(files) <= NAMED else {},
        looked_into,
    )


def _names_in(root: str, paths: Sequence[str]) -> list[str]:
    start = root.rstrip(os.sep) + os.sep
    return [path[len(start) :] if path.startswith(start) else os.path.relpath(path, root) for path in paths]


def of_shards(shards: Shards, root: str, targets: Any | None) -> Contents:
    """Contents of tar files below `root`, in order: their sizes, some of their bytes, and the labels, if known."""
    parts = {}
    for file, count, start in zip(shards.files, shards.lengths, shards.starts, strict=False):
        digest = blake2b(digest_size=8)
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                for place in (0, size // 2):
                    opened.seek(place)
                    digest.update(opened.read(4096))
        except OSError as refusal:
            raise DataError(f"cannot read shard {file}: {refusal.strerror}") from None
        digest.update(f"{size} {[] if targets is None else targets[start : start + count].tolist()}".encode())
        parts[printable(os.path.relpath(file, root))] = count, digest.hexdigest()
    return Contents("shard", parts)


def of_images(images: Dataset[Any], labels: Sequence[str]) -> Contents:
    """Contents of images without files: the class of each index, and the bytes or pixels of a few."""
    places: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        places.setdefault(label, []).append(index)
    count = len(images)  # type: ignore[arg-type]
    parts = {label: (len(indices), _digest(repr(indices).encode())) for label, indices in sorted(places.items())}
    looked_into = {f"image {index}": _digest_of_image(images, index) for index in spread(range(count), LOOKED_INTO)}
    return Contents("class", parts or {"": (count, "")}, {}, looked_into)


def spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """At most `most` items, spread evenly from the first towards the last."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def printable(name: str) -> str:
    """The name of a file as text that can be written as JSON, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def sizes_of(paths: Sequence[str]) -> list[int]:
    """The size of each file; -1 of what is not a file, since the size of a folder depends on the disk."""
    return [size for size, _ in sizes_and_times_of(paths)]


def sizes_and_times_of(paths: Sequence[str]) -> list[tuple[int, int]]:
    """The size of each file, and when it was changed last, in seconds since 1970. In threads, as some disks are remote.

    Whole seconds, because a copy of a file to another file system may lose the fraction.
    """
    parts = [paths[start : start + 1024] for start in range(0, len(paths), 1024)]
    with ThreadPoolExecutor(8) as threads:
        return [status for part in threads.map(lambda part: [*map(_size_and_time, part)], parts) for status in part]


def _size_and_time(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:
        return -1, 0
    return (status.st_size, int(status.st_mtime)) if S_ISREG(status.st_mode) else (-1, 0)


def _digest_of_file(path: str) -> str:
    try:
        return digest_of(Path(path))[:16]
    except OSError:
        return ""


def _digest_of_image(images: Dataset[Any], index: int) -> str:
    try:
        content = images.content(index) if hasattr(images, "content") else None
        return _digest(images[index][0].tobytes() if content is None else content)
    except DataError:
        return ""


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=8).hexdigest()

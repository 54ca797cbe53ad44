"""What the splits of a run held, in a few kilobytes: by it other images are found, wherever the data lie by now.

Names, sizes and classes of all images, and no times: data may be moved and copied. It takes one `stat` per file, a
second for 100,000 files on two busy cores with a local disk. The contents of a few are read too, since images without
compression have one size; two such images that change places and are none of these few are not noticed.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from stat import S_ISREG
from typing import Any, Literal, TypeVar

from torch.utils.data import Dataset

from probe_kd.data.shards import Shards
from probe_kd.errors import DataError
from probe_kd.files.atomic import digest_of

NAMED = 2000  # images of a split whose names are all kept; of more, a class is named and no image
LOOKED_INTO = 64
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Contents:
    """What a split held: of each part, a class or a shard, how many images, and a digest of their names and sizes.

    `files` are the sizes of all images by name, where these are few, and `looked_into` digests of what a few contain.
    """

    kind: Literal["class", "shard"]
    parts: dict[str, tuple[int, str]]
    files: dict[str, int] = field(default_factory=dict)
    looked_into: dict[str, str] = field(default_factory=dict)

    def difference(self, now: "Contents") -> str:
        """What is other by now, in words, with the name of one image where that is known; empty where all is alike."""
        told = _of_files(self.files, now.files) if self.files and now.files else []
        told = told or [*_of_parts(self, now)]
        if not told and list(self.parts) != list(now.parts):
            told = [f"the {_plural(self.kind)} come in another order"]
        other = [name for name, digest in now.looked_into.items() if self.looked_into.get(name, digest) != digest]
        return ", ".join(told or ([f"{_one_of(other)} has other contents"] if other else []))


def _of_files(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    gone, new = [name for name in before if name not in now], [name for name in now if name not in before]
    other = [name for name, size in now.items() if before.get(name, size) != size]
    told = [f"{_one_of(gone)} is not there any more"] if gone else []
    told += [f"{_one_of(new)} is new"] if new else []
    told += [f"{_one_of(other)} has {now[other[0]]} bytes and had {before[other[0]]}"] if other else []
    return told


def _of_parts(before: Contents, now: Contents) -> Iterable[str]:
    """Of the first part that is another."""
    kind = now.kind
    for name in [*before.parts, *now.parts]:
        (had, digest), (has, other) = before.parts.get(name, (0, "")), now.parts.get(name, (0, ""))
        if name not in now.parts:
            yield f"{kind} {name!r} is not there any more ({had} images)"
        elif name not in before.parts:
            yield f"{kind} {name!r} is new ({has} images)"
        elif had != has:
            yield f"{kind} {name!r} has {has} images and had {had}"
        elif digest != other:
            yield f"{kind} {name!r} has other images, as many as before"
        else:
            continue
        return


def _one_of(names: Sequence[str]) -> str:
    return repr(names[0]) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def _plural(kind: str) -> str:
    return {"class": "classes", "shard": "shards"}[kind]


def of_files(files: Sequence[tuple[str, str]], root: str) -> Contents:
    """Of image files below `root`: `files` are (path, name of the class), in an order that follows from the names."""
    start = root.rstrip(os.sep) + os.sep
    names = [path[len(start) :] if path.startswith(start) else os.path.relpath(path, root) for path, _ in files]
    digests: dict[str, Any] = {}
    counts: dict[str, int] = {}
    sizes = _sizes([path for path, _ in files])
    for name, size, (_, label) in zip(names, sizes, files, strict=True):
        counts[label] = counts.get(label, 0) + 1
        digests.setdefault(label, blake2b(digest_size=8)).update(os.fsencode(f"{name}\0{size}\0"))
    looked_into = {printable(names[it]): _digest_of_file(files[it][0]) for it in spread(range(len(files)), LOOKED_INTO)}
    return Contents(
        "class",
        {label: (counts[label], digest.hexdigest()) for label, digest in digests.items()},
        {printable(name): size for name, size in zip(names, sizes, strict=True)} if len(files) <= NAMED else {},
        looked_into,
    )


def of_shards(shards: Shards, root: str, targets: Any | None) -> Contents:
    """Of tar files below `root`, in their order: their sizes, some of their bytes, and the labels that are known."""
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
    """Of images that are no files: the class of each, by its number, and the bytes or pixels of a few."""
    places: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        places.setdefault(label, []).append(index)
    count = len(images)  # type: ignore[arg-type]
    parts = {label: (len(those), _digest(repr(those).encode())) for label, those in sorted(places.items())}
    looked_into = {f"image {index}": _digest_of_image(images, index) for index in spread(range(count), LOOKED_INTO)}
    return Contents("class", parts or {"": (count, "")}, {}, looked_into)


def spread(items: Sequence[_Item], most: int) -> list[_Item]:
    """So many of the items at most, from the first to the last."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def printable(name: str) -> str:
    """The name of a file as text that can be written as JSON, whatever bytes it has."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _sizes(paths: Sequence[str]) -> list[int]:
    """By threads, for file systems that are far away."""
    parts = [paths[start : start + 1024] for start in range(0, len(paths), 1024)]
    with ThreadPoolExecutor(8) as threads:
        return [size for part in threads.map(lambda part: [*map(_size, part)], parts) for size in part]


def _size(path: str) -> int:
    """-1 of what is no file: a folder has another size on another disk."""
    try:
        found = os.stat(path)
    except OSError:
        return -1
    return found.st_size if S_ISREG(found.st_mode) else -1


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

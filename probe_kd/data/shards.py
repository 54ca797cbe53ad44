"""Tar shards in webdataset's format, read by position: every image has an index, as in a folder of files.

timm's own reader runs through shards from one end to the other. It deals them out by process and worker and fills each
share up from its beginning, so that an epoch is not every image once; it shuffles by generators that live on from epoch
to epoch, so that none can be gone on with in its middle; and it passes over what it cannot read. A shard in a local
folder needs none of that: its headers tell where every image lies.
"""

import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from torch.utils.data import Dataset

from probe_kd.data.images import EXTENSIONS, decode
from probe_kd.errors import DataError, nearest
from probe_kd.files.atomic import whole_bytes

_BLOCKS = 1 << 20  # bytes that are read at a time
KINDS = ("jpg", "png", "webp")  # of images, as timm's reader looks for them: the first that a sample has


class _Split(BaseModel):
    filenames: list[str]
    shard_lengths: list[Annotated[int, Field(ge=0, le=10_000_000)]] = []  # room is made for so many
    alt_label: str = ""


class _Info(BaseModel):
    splits: dict[str, _Split] = {}


class Shards(Dataset[Any]):
    """The images of these tar files, in their order, in one mode of PIL, with their classes (the `.cls` files).

    `lengths` are how many images the files hold, where that is known, and so are `num_classes`. Raises DataError where
    a file is not there, and when one is read that holds another number of images or other classes, or is damaged; and
    for a sample that is no image with a class, unless `skip` leaves such ones out: `left_out` are their names. Images
    that are not `labelled` have no class, and all get index 0.
    """

    def __init__(
        self,
        files: Sequence[Path],
        lengths: Sequence[int],
        *,
        mode: str = "RGB",
        draft: int | None = None,
        num_classes: int | None = None,
        skip: bool = False,
        labelled: bool = True,
    ) -> None:
        self.labelled = labelled
        missing = [repr(str(file)) for file in files if not file.is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" * (len(missing) > 3)
            raise DataError(f"of {len(files)} shards these are not there: {', '.join(missing[:3])}{more}")
        # What is left out is known only when a file is read, and images have their numbers before.
        read = [] if lengths and not skip else [_places(file, skip=skip, labelled=labelled) for file in files]
        counted = [places for places, _ in read]
        self.files, self.mode, self.draft, self.num_classes = list(files), mode, draft, num_classes
        self.lengths = [len(places) for places in counted] or list(lengths)
        self.left_out = [f"{file.name}: {name}" for file, (_, left) in zip(files, read, strict=False) for name in left]
        for shard, ((places, left), length) in enumerate(zip(read, lengths, strict=False)):
            if length not in (len(places), len(places) + len(left)):
                raise self._miscounted(shard, len(places), length)
        self.starts = np.cumsum([0, *self.lengths])
        # (offset, bytes, class) of every image, read shard by shard when it is wanted; in memory that the workers of a
        # loader share, or each would read the headers of every shard anew in every epoch.
        self._index = torch.zeros(len(self), 3, dtype=torch.long)
        self._read = torch.zeros(len(files), dtype=torch.bool)
        for shared in (self._index, self._read):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        for shard, places in enumerate(counted):
            self._store(shard, places)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        if not self._read[shard]:
            self._store(shard, _places(self.files[shard], labelled=self.labelled)[0])
        offset, size, target = self._index[index].tolist()
        name = f"image {index - int(self.starts[shard])} (from 0) of shard {self.files[shard]}"
        try:
            with self.files[shard].open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as refusal:
            raise DataError(f"{name} cannot be read: {refusal.strerror}") from None
        return decode(BytesIO(content), self.mode, name, self.draft), target

    def read_labels(self, most: int = 20_000) -> None:
        """Read all labels, to find a wrong one before training. Above `most` images, only the first shard is read."""
        for shard in range(len(self.files)):
            if not self._read[shard] and (shard == 0 or len(self) <= most):
                self._store(shard, _places(self.files[shard], labelled=self.labelled)[0])

    @property
    def targets(self) -> Any:
        """The labels of all images; None until all are read."""
        return self._index[:, 2].numpy() if bool(self._read.all()) else None

    def _store(self, shard: int, places: Sequence[tuple[int, int, int]]) -> None:
        if len(places) != self.lengths[shard]:
            raise self._miscounted(shard, len(places), self.lengths[shard])
        wrong = [target for *_, target in places if not 0 <= target < (self.num_classes or target + 1)]
        if wrong:
            raise DataError(
                f"shard {self.files[shard]} has an image of class {wrong[0]}, which is none of the {self.num_classes} "
                "classes (0 is the first); set `num_classes`"
            )
        self._index[self.starts[shard] : self.starts[shard + 1]] = torch.tensor(places, dtype=torch.long).view(-1, 3)
        self._read[shard] = True  # last, since other workers look

    def _miscounted(self, shard: int, count: int, length: int) -> DataError:
        """The error for a complete file with another number of images. Reading finds incomplete files earlier."""
        return DataError(
            f"shard {self.files[shard]} is whole and holds {count} images{' with a class' * self.labelled}, and "
            "`shard_lengths` of its "
            f"_info.json says {length}; write the right number there, or fetch the shard that it is of"
        )


def open_shards(
    root: str | None,
    split: str,
    *,
    mode: str = "RGB",
    draft: int | None = None,
    num_classes: int | None = None,
    skip: bool = False,
    labelled: bool = True,
) -> Shards:
    """The shards of a split in a local folder, as timm names them.

    `split` is one of `_info.json` (or `info.json`), whose `splits` have `filenames` and `shard_lengths`; or names of
    files with braces, `digits-train-{0000..0009}.tar`, which needs webdataset. A number of images that follows these
    after `|` is not needed: where `_info.json` does not tell how many a file holds, its headers are counted. Raises
    DataError where there is nothing to read. With `skip` the headers of all files are read, and samples that are no
    image with a class are left out.
    """
    folder = Path(root or "")
    if not root or not folder.is_dir():
        raise DataError(
            f"there is no folder {root or ''!r} to read shards from; set `root` to a local folder (an address is not "
            "enough: images are read at their places in the files, so fetch these first)"
        )
    splits = _info(folder).splits
    if split in splits:
        if splits[split].alt_label and labelled:
            raise DataError(f"split {split!r} has its labels in JSON (`alt_label`); only `.cls` files are read")
        names = splits[split].filenames
    elif ".tar" in split:
        names = _expand(split.partition("|")[0])
    else:
        listing = f"has {', '.join(map(repr, splits))}" if splits else "has none (there is no _info.json)"
        raise DataError(
            f"there is no split {split!r} in {folder}, which {listing}{nearest(split, splits)}; name one of these, or "
            "the files themselves, as in `digits-{0000..0009}.tar`"
        )
    lengths = _lengths(splits)
    has_counts = all(name in lengths for name in names)
    files, counts = [folder / name for name in names], [lengths[name] for name in names] if has_counts else []
    shards = Shards(files, counts, mode=mode, draft=draft, num_classes=num_classes, skip=skip, labelled=labelled)
    if not len(shards):
        raise DataError(
            f"there are no images{' with a class' * labelled} in the split {split!r} of the shards in {folder}"
        )
    return shards


def _info(folder: Path) -> _Info:
    for name in ("_info.json", "info.json"):
        try:
            return _Info.model_validate_json(whole_bytes(folder / name))
        except FileNotFoundError:
            continue
        except ValidationError as refusal:
            error = refusal.errors()[0]
            place = ".".join(map(str, error["loc"])) or "the file"
            raise DataError(
                f"{folder / name} does not describe shards as timm has it: {place}: {error['msg']}"
            ) from None
        except OSError as refusal:
            raise DataError(f"cannot read {folder / name}: {refusal.strerror}") from None
    return _Info()


def _lengths(splits: Mapping[str, _Split]) -> dict[str, int]:
    """The number of images of each file, from splits that tell it for all of their files."""
    complete = [split for split in splits.values() if len(split.filenames) == len(split.shard_lengths)]
    return {name: count for split in complete for name, count in zip(split.filenames, split.shard_lengths, strict=True)}


def _expand(names: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise DataError(
            f"{names!r}: braces need webdataset (pip install 'probe-kd[wds]'); a split that _info.json names does not"
        ) from None
    return list(expand_urls(names))


def _places(file: Path, *, skip: bool = False, labelled: bool = True) -> tuple[list[tuple[int, int, int]], list[str]]:
    """(offset, bytes, class) of every image, and the names of samples that `skip` has left out.

    Raises DataError for what is no tar or not a whole one, and, unless they are left out, for an image without a class
    or a class without an image. What is nothing of the two is passed over. Without labels, classes are not looked for.
    """
    places, problems = [], {}
    try:
        with tarfile.open(file, "r:") as tar:  # what is compressed has no places
            for name, members in _samples(tar, file):
                sample = _sample(tar, members if labelled else [*_without_classes(members)], labelled=labelled)
                if isinstance(sample, tuple):
                    places.append(sample)
                elif sample:
                    problems[name] = sample
            end = tar.offset
    except (OSError, tarfile.TarError, ValueError) as refusal:
        raise DataError(f"cannot read {file}, which should be a tar file without compression: {refusal}") from None
    _check_end(file, end)  # before a sample is blamed that was whole
    if problems and not skip:
        name = next(iter(problems))
        raise DataError(
            f"sample {name!r} of shard {file} {problems[name]} ({len(problems)} such samples); mend the shard, or "
            "leave them out by `data: {on_error: skip}`"
        )
    return places, list(problems)


def _samples(tar: tarfile.TarFile, file: Path) -> Iterator[tuple[str, "_Parts"]]:
    """(name, its files), as they follow each other. Raises DataError where the tar file is cut off or damaged."""
    try:
        for name, members in groupby(_members(tar), key=lambda member: member[0]):
            yield name, [(suffix, member) for _, suffix, member in members]
    except (tarfile.TarError, ValueError) as refusal:
        size = file.stat().st_size
        if tar.offset > size or str(refusal) in ("empty header", "truncated header", "unexpected end of data"):
            raise DataError(f"{_damaged(file)}: it is cut off at byte {size}") from None
        raise DataError(f"{_damaged(file)}: {refusal}, at byte {tar.offset}") from None


_Parts = Sequence[tuple[str, tarfile.TarInfo]]


def _without_classes(parts: _Parts) -> Iterator[tuple[str, tarfile.TarInfo]]:
    return (part for part in parts if part[0] != "cls")


def _sample(tar: tarfile.TarFile, parts: _Parts, *, labelled: bool) -> tuple[int, int, int] | str:
    """(offset, bytes, class) of an image; else what is wrong with it, empty where it is nothing of an image."""
    files = dict(parts)
    if len(files) < len(parts):
        twice = next(suffix for suffix, member in parts if files[suffix] is not member)
        return f"has two files .{twice}"
    image = next((files[kind] for kind in KINDS if kind in files), None)
    if image is None:
        others = [f".{suffix}" for suffix in files if f".{suffix}" in EXTENSIONS]
        why = f": {others[0]} is not read, only {', '.join(KINDS)} are" if others else ""
        return f"has no image{why}" if others or "cls" in files else ""
    if not labelled:
        return image.offset_data, image.size, 0
    if "cls" not in files:
        return "has an image and no class (.cls)"
    label = tar.extractfile(files["cls"])
    text = label.read(100) if label is not None else b""
    try:
        return image.offset_data, image.size, int(text)
    except ValueError:
        return f"has no class number in its .cls file: {text[:20]!r}"


def _check_end(file: Path, end: int) -> None:
    """Raise DataError unless two blocks of zeros and nothing else follow: Python takes a damaged header for the end."""
    try:
        with file.open("rb") as opened:
            opened.seek(end)
            at, rest = end, opened.read(_BLOCKS)
            if len(rest) < tarfile.BLOCKSIZE or (len(rest) < 2 * tarfile.BLOCKSIZE and not rest.strip(b"\0")):
                raise DataError(
                    f"{_damaged(file)}: it is cut off at byte {end + len(rest)}, before the two blocks of zeros that "
                    "end a tar file"
                )
            while rest:
                other = at + len(rest) - len(rest.lstrip(b"\0"))
                if other < end + 2 * tarfile.BLOCKSIZE:
                    raise DataError(f"{_damaged(file)}: what should be a header is none, at byte {end}")
                if other < at + len(rest):
                    raise DataError(f"{_damaged(file)}: behind what looks like its end is more, at byte {other}")
                at, rest = at + len(rest), opened.read(_BLOCKS)
    except OSError as refusal:
        raise DataError(f"cannot read {file}: {refusal.strerror}") from None


def _damaged(file: Path) -> str:
    return f"shard {file} is damaged, and its other images cannot be found; fetch or write it anew"


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(name up to the first dot, the rest, the file): those that follow each other with one name are a sample."""
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if member.isreg() and stem and suffix and not re.match(r"__[^/]*__($|/)", member.name):  # what webdataset skips
            yield folder + slash + stem, suffix.lower(), member

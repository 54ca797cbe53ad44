"""Tar shards in webdataset's form, read at places: every image has a number, as in a folder of files.

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

from probe_kd.data.images import decode
from probe_kd.errors import DataError, nearest
from probe_kd.files.atomic import whole_bytes

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
    a file is not there, and when one is read that holds another number of images or other classes, or is damaged.
    """

    def __init__(
        self, files: Sequence[Path], lengths: Sequence[int], *, mode: str = "RGB", num_classes: int | None = None
    ) -> None:
        missing = [repr(str(file)) for file in files if not file.is_file()]
        if missing:
            more = f" and {len(missing) - 3} more" * (len(missing) > 3)
            raise DataError(f"of {len(files)} shards these are not there: {', '.join(missing[:3])}{more}")
        counted = [] if lengths else [_places(file) for file in files]
        self.files, self.mode, self.num_classes = list(files), mode, num_classes
        self.lengths = [len(places) for places in counted] or list(lengths)
        self.starts = np.cumsum([0, *self.lengths])
        # (offset, bytes, class) of every image, read shard by shard when it is wanted; in memory that the workers of a
        # loader share, or each would read the headers of every shard anew in every epoch.
        self._known = torch.zeros(len(self), 3, dtype=torch.long)
        self._read = torch.zeros(len(files), dtype=torch.bool)
        for shared in (self._known, self._read):
            shared.share_memory_()  # type: ignore[no-untyped-call]
        for shard, places in enumerate(counted):
            self._keep(shard, places)

    def __len__(self) -> int:
        return int(self.starts[-1])

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self.starts, index, side="right")) - 1
        if not self._read[shard]:
            self._keep(shard, _places(self.files[shard]))
        offset, size, target = self._known[index].tolist()
        name = f"image {index - int(self.starts[shard])} (from 0) of shard {self.files[shard]}"
        try:
            with self.files[shard].open("rb") as file:
                file.seek(offset)
                content = file.read(size)
        except OSError as refusal:
            raise DataError(f"{name} cannot be read: {refusal.strerror}") from None
        return decode(BytesIO(content), self.mode, name), target

    def read_labels(self, most: int = 20_000) -> None:
        """Read all labels, so that a wrong one is told before training; of so many images at most, for their time."""
        for shard in range(len(self.files)):
            if not self._read[shard] and (shard == 0 or len(self) <= most):
                self._keep(shard, _places(self.files[shard]))

    @property
    def targets(self) -> Any:
        """The labels of all images; None where they are not read yet."""
        return self._known[:, 2].numpy() if bool(self._read.all()) else None

    def _keep(self, shard: int, places: Sequence[tuple[int, int, int]]) -> None:
        if len(places) != self.lengths[shard]:
            raise DataError(
                f"shard {self.files[shard]} holds {len(places)} images with a class, and `shard_lengths` of its "
                f"_info.json says {self.lengths[shard]}; write the right number there"
            )
        wrong = [target for *_, target in places if not 0 <= target < (self.num_classes or target + 1)]
        if wrong:
            raise DataError(
                f"shard {self.files[shard]} has an image of class {wrong[0]}, which is none of the {self.num_classes} "
                "classes (0 is the first); set `num_classes`"
            )
        self._known[self.starts[shard] : self.starts[shard + 1]] = torch.tensor(places, dtype=torch.long).view(-1, 3)
        self._read[shard] = True  # last, since other workers look


def open_shards(root: str | None, split: str, *, mode: str = "RGB", num_classes: int | None = None) -> Shards:
    """The shards of a split in a local folder, as timm names them.

    `split` is one of `_info.json` (or `info.json`), whose `splits` have `filenames` and `shard_lengths`; or names of
    files with braces, `digits-train-{0000..0009}.tar`, which needs webdataset. A number of images that follows these
    after `|` is not needed: where `_info.json` does not tell how many a file holds, its headers are counted. Raises
    DataError where there is nothing to read.
    """
    folder = Path(root or "")
    if not root or not folder.is_dir():
        raise DataError(
            f"there is no folder {root!r} to read shards from; set `root` to a local folder (an address is not enough: "
            "images are read at their places in the files, so fetch these first)"
        )
    splits = _info(folder).splits
    if split in splits:
        if splits[split].alt_label:
            raise DataError(f"split {split!r} has its labels in JSON (`alt_label`); only `.cls` files are read")
        names = splits[split].filenames
    elif ".tar" in split:
        names = _expand(split.partition("|")[0])
    else:
        says = f"has {', '.join(map(repr, splits))}" if splits else "has none (there is no _info.json)"
        raise DataError(
            f"there is no split {split!r} in {folder}, which {says}{nearest(split, splits)}; name one of these, or the "
            "files themselves, as in `digits-{0000..0009}.tar`"
        )
    lengths = _lengths(splits)
    known = all(name in lengths for name in names)
    files, counts = [folder / name for name in names], [lengths[name] for name in names] if known else []
    found = Shards(files, counts, mode=mode, num_classes=num_classes)
    if not len(found):
        raise DataError(f"there are no images with a class in the split {split!r} of the shards in {folder}")
    return found


def _info(folder: Path) -> _Info:
    for name in ("_info.json", "info.json"):
        try:
            return _Info.model_validate_json(whole_bytes(folder / name))
        except FileNotFoundError:
            continue
        except ValidationError as refusal:
            found = refusal.errors()[0]
            at = ".".join(map(str, found["loc"])) or "the file"
            raise DataError(f"{folder / name} does not describe shards as timm has it: {at}: {found['msg']}") from None
        except OSError as refusal:
            raise DataError(f"cannot read {folder / name}: {refusal.strerror}") from None
    return _Info()


def _lengths(splits: Mapping[str, _Split]) -> dict[str, int]:
    """How many images each file holds, of the splits that say so for all of theirs."""
    told = [split for split in splits.values() if len(split.filenames) == len(split.shard_lengths)]
    return {name: count for split in told for name, count in zip(split.filenames, split.shard_lengths, strict=True)}


def _expand(names: str) -> list[str]:
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise DataError(
            f"{names!r}: braces need webdataset (pip install 'probe-kd[wds]'); a split that _info.json names does not"
        ) from None
    return list(expand_urls(names))


def _places(file: Path) -> list[tuple[int, int, int]]:
    """(offset, bytes, class) of every sample that has an image and a class. Raises DataError for what is no tar."""
    found = []
    try:
        with tarfile.open(file, "r:") as tar:  # what is compressed has no places
            for _, members in groupby(_members(tar), key=lambda member: member[0]):
                parts = {suffix: member for _, suffix, member in members}
                image = next((parts[kind] for kind in KINDS if kind in parts), None)
                label = tar.extractfile(parts["cls"]) if "cls" in parts else None
                if image is not None and label is not None:
                    found.append((image.offset_data, image.size, int(label.read())))
    except (OSError, tarfile.TarError, ValueError) as refusal:
        raise DataError(f"cannot read {file}, which should be a tar file without compression: {refusal}") from None
    return found


def _members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """(name up to the first dot, the rest, the file): those that follow each other with one name are a sample."""
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        if member.isreg() and stem and suffix and not re.match(r"__[^/]*__($|/)", member.name):  # what webdataset skips
            yield folder + slash + stem, suffix.lower(), member

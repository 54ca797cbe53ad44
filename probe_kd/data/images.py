"""Image files: every image becomes what a viewer shows, or an error with its name.

timm's folder reader replaces a file that it cannot read by the next one, with that one's label, follows links that go
round, and numbers the classes of every split by itself. So folders are read here, in timm's order and with its names.
"""

import os
import re
import stat
import unicodedata
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image
from torch.utils.data import Dataset

from probe_kd.errors import DataError

WITHOUT_LABELS = "train without labels: `data: {labels: none}`"
EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")
# What Pillow may take a file for, whatever it is called: EPS, which runs Ghostscript, and documents are no images.
_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "BMP", "DIB", "TIFF", "GIF", "PPM", "JPEG2000", "AVIF")
_BITS, _PHOTOMETRIC = 258, 262  # tags of TIFF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def open_image(path: str | Path, mode: str, draft: int | None = None) -> Image.Image:
    """The image in a file, in one mode of PIL (`RGB` or `L`). Raises DataError with its name where there is none."""
    with _regular_file(path) as file:
        return decode(file, mode, str(path), draft)


def decode(file: IO[bytes], mode: str, name: str, draft: int | None = None) -> Image.Image:
    """The image of an open file as a viewer shows it: turned as its EXIF data say, on white where it is transparent.

    Grey of 16 bits is scaled to 8. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if both sides are still at least
    `draft`. Raises DataError, with the `name` it is given, for what is no whole image.
    """
    try:
        image = Image.open(file, formats=_formats())
        if draft is not None:
            image.draft(None, (draft, draft))  # of other formats it does nothing
        image.load()
        return _flat(_eight_bits(_upright(image), image), mode)
    except Exception as refusal:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, ... for damaged files
        why = re.sub(r" <.*?>", "", " ".join(str(refusal).split())) or type(refusal).__name__
        raise DataError(f"{name} cannot be read: {why}") from refusal


@cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in _FORMATS if name in Image.OPEN]


@contextmanager
def _regular_file(path: str | Path) -> Iterator[IO[bytes]]:
    """The opened file. Refuses pipes and devices, which could block forever."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        handle = os.open(path, flags)
    except OSError as refusal:
        raise DataError(f"{path} cannot be read: {refusal.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise DataError(f"{path} cannot be read: it is {kind}, and not an image file")
        if not status.st_size:
            raise DataError(f"{path} cannot be read: it is empty")
        with open(handle, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(handle)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # a viewer shows an image whose EXIF data are damaged as it lies
        return image
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _eight_bits(image: Image.Image, source: Image.Image) -> Image.Image:
    """Grey of 9 to 16 bits scaled, and not cut off at 255 as by `convert`. Raises ValueError where no range is known.

    `source` is the image as it was opened, which knows its file's tags.
    """
    if image.mode == "F":
        raise ValueError("its pixels are floats, whose range nobody knows; save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    tags: Mapping[int, Any] = getattr(source, "tag_v2", {})
    pixels, most = np.asarray(image).astype(np.int64), 2 ** min(16, *tags.get(_BITS, (16,))) - 1
    if pixels.min() < 0 or pixels.max() > 65535 or max(tags.get(_BITS, (16,))) > 16:
        raise ValueError("its pixels are whole numbers of more than 16 bits; save it with 8 or 16")
    grey = (pixels * 255 + most // 2) // most
    if tags.get(_PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    transparent = source.info.get("transparency")
    if isinstance(transparent, int):  # on white, as in `_flat`
        grey[pixels == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8))


def _flat(image: Image.Image, mode: str) -> Image.Image:
    """In this mode, on white where it is transparent: `convert` would show what stands behind the transparency."""
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


class FolderImages(Dataset[Any]):
    """Image files in the folder `root` with their classes: `samples` are (path, class index)."""

    def __init__(self, samples: Sequence[tuple[str, int]], mode: str, root: str, *, draft: int | None = None) -> None:
        self.samples, self.mode, self.root, self.draft = list(samples), mode, root, draft

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        path, target = self.samples[index]
        return open_image(path, self.mode, self.draft), target


@dataclass(frozen=True)
class FolderScan:
    """The contents of the folder of one split: the files of every class, in order, and notes for the user.

    `empty` are class folders without images, `notes` sentences, and `unfollowed` those of them on links.
    """

    files: Mapping[str, Sequence[str]]
    empty: Sequence[str]
    notes: Sequence[str]
    linked: bool = False  # whether it contains a link
    unfollowed: Sequence[str] = ()

    def samples(self, class_to_idx: Mapping[str, int], *, by_path: bool) -> list[tuple[str, int]]:
        """All files with their class index; in timm's order by path, or class after class as torchvision has it."""
        samples = [(path, class_to_idx[name]) for name, paths in self.files.items() for path in paths]
        return sorted(samples, key=lambda sample: natural_order(sample[0])) if by_path else samples


@dataclass
class _Walk:
    """The folders of a split: the image files of each, and which have folders in them."""

    images: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, list[str]] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    unfollowed: list[str] = field(default_factory=list)
    doubled: dict[str, str] = field(default_factory=dict)  # links to folders that are read anyway
    linked: bool = False


def scan_folder(root: str | Path, *, outermost: bool = False) -> FolderScan:
    """Find the images of a split, by class.

    A class is the innermost folder of an image, as timm has it, or the `outermost` within `root`, as torchvision's
    ImageFolder has it. Folders whose names begin with a dot are left out. Raises DataError where images are in no class
    folder, or one innermost folder would mix the images of several.
    """
    top = str(root)
    walk = _walk(top)
    if walk.images[top]:
        raise DataError(_why_no_class(walk, top))
    inside = {folder: os.path.relpath(folder, top).split(os.sep) for folder in walk.images if folder != top}
    label = _class_names({folder: parts[0 if outermost else -1] for folder, parts in inside.items()})
    if not outermost:
        _check_innermost(walk, inside, label)
    files: dict[str, list[str]] = {}
    for folder in sorted(inside):
        if walk.images[folder]:
            files.setdefault(label[folder], []).extend(sorted(walk.images[folder]))
    ordered = sorted(files) if outermost else sorted(files, key=natural_order)
    bare = [folder for folder in inside if not walk.images[folder] and (outermost or not walk.folders[folder])]
    empty = dict.fromkeys(label[folder] for folder in bare if label[folder] not in files)
    unfollowed = _links(walk)
    notes = [*unfollowed, *_notes(walk, top)]
    nested = next((parts for folder, parts in inside.items() if walk.images[folder] and len(parts) > 1), None)
    if nested and not outermost:
        notes.append(
            f"the classes in {top} are the innermost folders ({nested[-1]!r} of {'/'.join(nested)!r}), as timm has it; "
            "`dataset: torch/image_folder` takes the outermost"
        )
    return FolderScan({name: files[name] for name in ordered}, sorted(empty), notes, walk.linked, unfollowed)


def scan_unlabelled(root: str | Path) -> FolderScan:
    """Find all images of a folder and of the folders in it, in timm's order by path, as of one class without a name."""
    walk = _walk(str(root))
    files = sorted((path for paths in walk.images.values() for path in paths), key=natural_order)
    unfollowed = _links(walk)
    notes = [*unfollowed, *_notes(walk, str(root))]
    return FolderScan({"": files} if files else {}, (), notes, walk.linked, unfollowed)


def _class_names(folders: Mapping[str, str]) -> dict[str, str]:
    """The class of each folder: its name as Unicode composes it, since a copy by another system may not."""
    written: dict[str, str] = {}
    for folder, name in folders.items():
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"the name of {folder!r} is no UTF-8, and a class needs one; rename that folder") from None
        other = written.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise DataError(
                f"two class folders differ only in how Unicode writes their name, {other!a} and {name!a}; "
                "make one folder of them"
            )
    return {folder: unicodedata.normalize("NFC", name) for folder, name in folders.items()}


def natural_order(text: str) -> tuple[list[str | int], str]:
    """timm's order, in which 2 comes before 10; names that it holds for equal (01 and 1) have an order too."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if part.isdecimal() else part for part in parts], text


def _walk(top: str) -> _Walk:
    """Visit every folder once. Links to a visited folder, or to one that contains the link, are not followed."""
    walk, real_top = _Walk(), os.path.realpath(top)
    visited = {real_top}
    folders, links = deque([(top, real_top)]), deque[tuple[str, str]]()
    while folders or links:
        if folders:
            folder, real = folders.popleft()
        else:  # after all that is no link, so that an image has the class of the folder that it lies in
            folder, real = links.popleft()
            parent = os.path.realpath(os.path.dirname(folder))
            if real == real_top or f"{parent}{os.sep}".startswith(real.rstrip(os.sep) + os.sep):
                walk.unfollowed.append(folder)
                continue
            if real in visited:
                walk.doubled[folder] = real
                continue
            visited.add(real)
        walk.images[folder], walk.folders[folder] = [], []
        for entry in _entries(folder):
            walk.linked |= entry.is_symlink()
            is_folder, suffix = _is_folder(entry), os.path.splitext(entry.name)[1].lower()
            if is_folder and not entry.name.startswith("."):
                inner = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
                if entry.is_symlink():
                    links.append((entry.path, inner))
                elif inner in visited:
                    walk.unfollowed.append(entry.path)
                    continue
                else:
                    visited.add(inner)
                    folders.append((entry.path, inner))
                walk.folders[folder].append(entry.path)
            elif not is_folder and suffix in EXTENSIONS:
                walk.images[folder].append(entry.path)
            elif not is_folder:
                walk.left_out[suffix] += 1
    _take_for_images(walk, top)
    return walk


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as refusal:
        raise DataError(f"cannot look into {folder}: {refusal.strerror}") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _take_for_images(walk: _Walk, top: str) -> None:
    """Count an empty folder inside a class whose name is that of an image as an unreadable image."""
    for folder in reversed(list(walk.images)):
        parent, holds = os.path.dirname(folder), walk.images[folder] or walk.folders[folder]
        if top not in (folder, parent) and folder.lower().endswith(EXTENSIONS) and not holds:
            walk.images[parent].append(folder)
            walk.folders[parent].remove(folder)
            del walk.images[folder], walk.folders[folder]


def _why_no_class(walk: _Walk, top: str) -> str:
    count, first = len(walk.images[top]), walk.images[top][0]
    if not any(images for folder, images in walk.images.items() if folder != top):
        return (
            f"the {count} images in {top} are in no class folders, and an image has the class of its folder; make one "
            f"folder for each class in it, or {WITHOUT_LABELS}"
        )
    return (
        f"{count} images lie beside the class folders in {top} and have no class ({first}, ...); move them into one, "
        f"or {WITHOUT_LABELS}"
    )


def _check_innermost(walk: _Walk, inside: Mapping[str, Sequence[str]], label: Mapping[str, str]) -> None:
    """Raise DataError if the innermost folders do not determine the class of every image."""
    outer = "`dataset: torch/image_folder` takes the outermost folders as classes"
    taken: dict[str, str] = {}
    for folder in inside:
        if not walk.images[folder]:
            continue
        other = taken.setdefault(label[folder], folder)
        if other != folder:
            raise DataError(f"two folders would be one class {label[folder]!r}: {other} and {folder}; {outer}")
        below = next((inner for inner in walk.folders[folder] if walk.images.get(inner)), None)
        if below:
            raise DataError(f"there are images in {folder} and in {below} inside it: which is the class? {outer}")


def _links(walk: _Walk) -> list[str]:
    notes = [f"a link that goes round was not followed: {folder}" for folder in walk.unfollowed]
    notes += [
        f"{folder} is a link to {real}, whose images are read already, and was not followed: it is no class of its own"
        for folder, real in walk.doubled.items()
    ]
    return notes


def _notes(walk: _Walk, top: str) -> list[str]:
    notes: list[str] = []
    pictures = {suffix: count for suffix, count in walk.left_out.items() if suffix in _registered()}
    if pictures:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(pictures.items()))
        notes.append(f"files in {top} that are not read as images: {counts}; read are {' '.join(EXTENSIONS)}")
    return notes


@cache
def _registered() -> set[str]:
    """Extensions of images: all that Pillow knows, and those of cameras that it does not."""
    return {*Image.registered_extensions(), ".heic", ".heif", ".dng", ".cr2", ".nef"} - {".pdf"}

"""What a teacher's cache depends on: the key that names its folder, and what differs in another cache beside it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from probe_kd.data.digests import sizes_and_times_of
from probe_kd.data.label_sets import MultiHotImages
from probe_kd.data.timm_datasets import files_of
from probe_kd.errors import DataError
from probe_kd.files.atomic import whole_text

FORMAT = 3  # changes if the format of rows does, or what an adapter of the same name computes
DEPENDS_ON = "depends-on.json"  # in the folder of a cache
LIBRARIES = ("torch", "torchvision", "timm", "pillow")


class Fingerprint(NamedTuple):
    """Digests of a data set: of the images and their order, and of the times when their files were changed.

    `times` is empty without files. It is in no key, since data may be copied.
    """

    images: str
    times: str


def depends_on(teacher: nn.Module, images: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that a cache depends on: weights, the `Fingerprint.images`, versions of libraries, and what `about` says."""
    dependencies = {
        "format": FORMAT,
        "teacher": digest_of_weights(teacher),
        "images": images,
        "versions": {name: version(name) for name in LIBRARIES},
        **about,
    }
    plain: dict[str, Any] = json.loads(json.dumps(dependencies, default=str))
    return plain


def as_text(dependencies: Mapping[str, Any]) -> str:
    """What a cache depends on as JSON, for the file in its folder."""
    return json.dumps(dependencies, indent=1, sort_keys=True)


def key_of(dependencies: Mapping[str, Any]) -> str:
    """The name of the folder of a cache."""
    return hashlib.sha256(as_text(dependencies).encode()).hexdigest()[:16]


def differences_beside(folder: Path, dependencies: Mapping[str, Any]) -> tuple[Path, str] | None:
    """Of the caches beside `folder` that hold rows of the same teacher and images, the one that differs least.

    Returns its folder and what differs in words; None if there is none.
    """
    own, closest = _flat(dependencies), None
    for file in sorted(folder.parent.glob(f"*/{DEPENDS_ON}")):
        with suppress(OSError, ValueError, AttributeError):  # of a file that somebody edited
            other = _flat(json.loads(whole_text(file)))
            differing = [name for name in {**other, **own} if other.get(name) != own.get(name)]
            same = not {"teacher", "images"} & set(differing)
            if same and differing and any(file.parent.glob("*/*.safetensors")):
                texts = [f"{_short(name)} {other.get(name)} (here {own.get(name)})" for name in differing]
                closest = min(filter(None, (closest, (len(texts), file.parent, ", ".join(texts)))))
    return closest and closest[1:]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings, by names with dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _short(name: str) -> str:
    return name.removeprefix("versions.").removeprefix("views.")


def fingerprint(images: Dataset[Any]) -> Fingerprint:
    """Digests of the images and their order, from the names and sizes of all files or all pixels, and of their times.

    The first does not depend on where the files lie, nor on their times, so that data may be copied. It always includes
    the pixels of some images. Without files or pixels in memory, it has nothing else.
    """
    if isinstance(images, Subset):
        whole = fingerprint(images.dataset)
        return whole._replace(images=_digest([whole.images.encode(), repr(list(images.indices)).encode()]))
    if isinstance(images, MultiHotImages):  # no teacher sees the labels
        return fingerprint(images.images)
    count, times = len(images), ""  # type: ignore[arg-type]
    parts = [str(count).encode()]
    inner = getattr(images, "images", images)
    if paths := _paths(images, inner):
        statuses = sizes_and_times_of(paths)
        parts += _names_and_sizes(paths, [size for size, _ in statuses])
        times = _digest(str(time).encode() for _, time in statuses)
    elif hasattr(inner, "data"):
        parts.append(_bytes_of(torch.as_tensor(inner.data)))
    for index in range(0, count, max(1, count // 64)):
        try:
            image, _ = images[index]
        except DataError:  # it may be one that the recipe leaves out
            continue
        parts += [f"{image.mode} {image.size}".encode(), image.tobytes()]
    return Fingerprint(_digest(parts), times)


def _paths(images: Dataset[Any], inner: Any) -> list[str]:
    """The files of a data set in their order; none if it does not read files."""
    if hasattr(images, "samples"):
        return [path for path, _ in images.samples]
    return list(map(str, getattr(images, "files", ()))) or [path for path, _ in files_of(inner)]


def _names_and_sizes(paths: list[str], sizes: list[int]) -> Iterable[bytes]:
    # What the first and the last in the order of the alphabet have in common, all have. `commonpath` would raise for
    # a mixture of absolute and relative paths.
    folder = os.path.dirname(os.path.commonprefix([min(paths), max(paths)]))  # noqa: RUF071
    for path, size in zip(paths, sizes, strict=True):
        yield os.fsencode(f"{path[len(folder) :]}\0{size}")


def digest_of_weights(model: nn.Module) -> str:
    return _digest(_bytes_of(tensor) for tensor in _named(model))


def _named(module: nn.Module) -> Iterable[Tensor]:
    return (tensor for _, tensor in sorted(module.state_dict().items()))


def _bytes_of(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()

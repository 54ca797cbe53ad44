"""`data`: open the data sets and try the transforms."""

from contextlib import suppress
from typing import Any

from PIL import Image

from probe_kd.data.datasets import Datasets, open_datasets
from probe_kd.data.loading import loader
from probe_kd.data.options import DataOptions
from probe_kd.data.record import DataRecord
from probe_kd.engine.spec import InputSpec
from probe_kd.errors import DataError, short
from probe_kd.recipe.sections.mistakes import Mistake


def open_data(data: DataOptions, record: DataRecord | None) -> tuple[Datasets | None, list[Mistake]]:
    """Open the data sets. With the `record` of a former run, classes have the same numbers as in that run."""
    try:
        return open_datasets(data, record), []
    except DataError as refusal:
        key = refusal.key or ("dataset" if data.dataset else "root")
        return None, [(("data", key), str(refusal))]


def check_transforms(data: DataOptions) -> list[Mistake]:
    try:
        _try_transforms(data)
    except DataError as refusal:
        return [(("data", *_key_to_blame(data)), str(refusal))]
    return []


def _try_transforms(options: DataOptions) -> None:
    """Transform one grey image as in training, because timm checks `aa` and others only when it uses them."""
    size = (options.input_size[0], 32, 32)
    plain = options.model_copy(update={"workers": 0, "memory": False})
    images: Any = [(Image.new("L" if size[0] == 1 else "RGB", (32, 32), 128), 0)]
    try:
        next(iter(loader(images, plain, InputSpec(size).or_plain(), training=True)))
    except Exception as refusal:  # timm and torchvision raise many types of errors
        raise DataError(f"the images cannot be transformed as `data` says: {short(refusal)}") from None


def _key_to_blame(options: DataOptions) -> list[str]:
    """The first key whose default makes the transforms work; empty if no single one does."""
    defaults = DataOptions(input_size=options.input_size)
    for key in ("aa", "ratio", "scale", "color_jitter", "crop_pct", "reprob"):
        with suppress(DataError):
            _try_transforms(options.model_copy(update={key: getattr(defaults, key)}))
            return [key]
    return []

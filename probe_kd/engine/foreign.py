"""Models of other libraries than timm by name: `transformers:PLACE` and `open_clip:PLACE`.

`transformers:ORG/NAME` and `transformers:FOLDER` are what `AutoModel` makes of a config, or
`AutoModelForImageClassification` where the config is of a classifier. Of a model of images and text it is the vision
model. `open_clip:NAME`, `open_clip:NAME.TAG`, `open_clip:ORG/NAME` and `open_clip:FOLDER` are image towers. Weights are
read from safetensors alone, and all of them have to be there.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from probe_kd.engine.arguments import MAX_NUMBER
from probe_kd.engine.open_clip_models import arguments_of_open_clip, build_open_clip
from probe_kd.engine.transformers_models import arguments_of_transformers, build_transformers
from probe_kd.errors import TraceError, nearest, short
from probe_kd.files.atomic import irregular

LIBRARIES = {"transformers": "transformers", "open_clip": "open_clip_torch"}  # module: name of its package
_HUB = re.compile(r"[\w.-]+/[\w.-]+")


def library_of(name: str) -> str:
    """Return the library that builds the model of this name, `transformers` or `open_clip`, otherwise empty."""
    library, colon, _ = name.partition(":")
    return library if colon and library in LIBRARIES else ""


def check_foreign(name: str, model_kwargs: Mapping[str, Any]) -> None:
    """Check that a library has the named model and that the model accepts these arguments. Raises TraceError."""
    library, _, place = name.partition(":")
    if find_spec(library) is None:
        raise TraceError(f"{name} needs {LIBRARIES[library]}: pip install 'probe-kd[foreign]'")
    _check_place(name, place)
    arguments = arguments_of_transformers if library == "transformers" else arguments_of_open_clip
    try:
        with _quiet():
            known = arguments(place)
    except Exception as refusal:  # configs and hubs fail in every way
        raise TraceError(f"cannot build {name}: {short(refusal)}") from refusal
    _check_arguments(name, known, model_kwargs)


def build_foreign(name: str, model_kwargs: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    """Build the named model, with its preprocessing as timm's `pretrained_cfg`. Errors are those of its library."""
    library, _, place = name.partition(":")
    build = build_transformers if library == "transformers" else build_open_clip
    with _quiet():
        return build(place, dict(model_kwargs), pretrained)


def foreign_files(name: str, *, pretrained: bool) -> list[Path]:
    """Return the files that are read from the folder of a model. Empty for a model on the hub."""
    folder = Path(name.partition(":")[2])
    if not folder.is_dir():
        return []
    kinds = ("*.json", "*.safetensors") if pretrained else ("*config.json",)
    return sorted({file for kind in kinds for file in folder.glob(kind)})


def _check_place(name: str, place: str) -> None:
    folder = Path(place)
    if folder.is_dir():
        if irregular(folder):  # nobody waits for a FIFO
            raise TraceError(f"cannot build {name}: {irregular(folder)[0]!r} in it is no regular file")
    elif not (_HUB.fullmatch(place) or name.startswith("open_clip:")):
        beside = [file.name for file in folder.parent.glob("*")] if folder.parent.is_dir() else []
        expected = "a folder that `save_pretrained` wrote, or ORG/NAME on the Hugging Face hub"
        raise TraceError(
            f"cannot build {name}: there is no {place!r}{nearest(folder.name, beside)}; expected {expected}"
        )


def _check_arguments(name: str, known: Iterable[str], given: Mapping[str, Any]) -> None:
    known = sorted(known)
    for key, value in given.items():
        if key not in known:
            sized = "; it takes images of its own size: `input_size`" if key == "img_size" else ""
            raise TraceError(f"`{key}` is no argument of {name}{sized or nearest(key, known)}")
        numbers = value if isinstance(value, list | tuple) else [value]
        largest = max((abs(number) for number in numbers if isinstance(number, int | float)), default=0)
        if largest > MAX_NUMBER:
            raise TraceError(f"`{key}` of {name} is {largest}; expected no number above {MAX_NUMBER}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide progress bars, and the warnings about weights that do not belong to the vision model."""
    loggers = [logging.getLogger(library) for library in LIBRARIES]
    levels = [logger.level for logger in loggers]
    bars = _show_bars(False)
    try:
        if not logging.getLogger().isEnabledFor(logging.INFO):  # --verbose
            for logger in loggers:
                logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        _show_bars(bars)


def _show_bars(shown: bool) -> bool:
    """Show or hide the progress bars of transformers. Returns whether they were shown before."""
    if find_spec("transformers") is None:
        return True
    from transformers.utils import logging as bars

    former: bool = bars.is_progress_bar_enabled()
    (bars.enable_progress_bar if shown else bars.disable_progress_bar)()
    return former

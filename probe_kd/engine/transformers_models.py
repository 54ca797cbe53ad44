"""Vision models of transformers, from a config and weights in safetensors; no code of a model's folder is run."""

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import nn

from probe_kd.errors import TraceError


class _Kind(NamedTuple):
    """The model that a config stands for: its factory in transformers, and whether it is a classifier."""

    config: Any
    factory: Any
    classifies: bool


def _kind_of(place: str, classes: int | None) -> _Kind:
    """Read a config. `classes` asks for a classifier, or with 0 for a backbone; None is what the config describes."""
    from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

    config = AutoConfig.from_pretrained(place, trust_remote_code=False)
    architectures = getattr(config, "architectures", None) or []
    config = getattr(config, "vision_config", config)
    own = any(str(architecture).endswith("ForImageClassification") for architecture in architectures)
    classifies = own if classes is None else classes > 0
    return _Kind(config, AutoModelForImageClassification if classifies else AutoModel, classifies)


def arguments_of_transformers(place: str) -> set[str]:
    """Return the arguments of a model: the fields of its own config, and timm's names for two of them."""
    from transformers import PreTrainedConfig

    config = _kind_of(place, None).config
    own = {*signature(type(config)).parameters} - {*signature(PreTrainedConfig).parameters}
    sizes = {"image_size"}  # another one would need other weights
    return {key for key in own - sizes if not key.startswith("_")} | {"num_classes", "in_chans", "add_pooling_layer"}


def build_transformers(place: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    classes = arguments.pop("num_classes", None)
    kind = _kind_of(place, classes)
    if "in_chans" in arguments:
        arguments["num_channels"] = arguments.pop("in_chans")
    pooled = {key: arguments.pop(key) for key in ("add_pooling_layer",) if key in arguments}
    for key, value in arguments.items():
        setattr(kind.config, key, value)
    if kind.classifies and classes is not None:
        kind.config.num_labels = classes
    model = _load(place, kind, pooled) if pretrained else _from_config(kind, pooled)
    model.pretrained_cfg = _preprocessing(place, model, kind)  # type: ignore[assignment]
    return model


def _from_config(kind: _Kind, pooled: Mapping[str, Any]) -> nn.Module:
    model: nn.Module = kind.factory.from_config(kind.config, dtype=torch.float32, **pooled)
    return model


def _load(place: str, kind: _Kind, pooled: Mapping[str, Any]) -> nn.Module:
    """Load the weights. A classifier of another number of classes is new. Raises TraceError for missing weights."""
    loaded = kind.factory.from_pretrained(
        place,
        config=kind.config,
        dtype=torch.float32,
        trust_remote_code=False,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **pooled,
    )
    model: nn.Module = loaded[0]
    mismatched = [name if isinstance(name, str) else name[0] for name in loaded[1]["mismatched_keys"]]
    heads = tuple(f"{head}." for head in _heads(model)) if kind.classifies else ()
    lost = [name for name in sorted({*loaded[1]["missing_keys"], *mismatched}) if not name.startswith(heads or ("?",))]
    if lost:
        hint = "; build it without by `model_kwargs: {add_pooling_layer: false}`" if _all_pooler(lost) else ""
        raise TraceError(f"the weights of {place} have no {', '.join(lost[:3])}{' ...' * (len(lost) > 3)}{hint}")
    return model


def _all_pooler(names: Iterable[str]) -> bool:
    return all("pooler" in name for name in names)


def _heads(model: nn.Module) -> list[str]:
    base = str(getattr(model, "base_model_prefix", ""))
    return [name for name, _ in model.named_children() if name != base]


def _preprocessing(place: str, model: nn.Module, kind: _Kind) -> dict[str, Any]:
    """Return size, mean and std from the processor's config, in the form of timm's `pretrained_cfg`."""
    channels = int(getattr(kind.config, "num_channels", 3))
    processor = _processor(place)
    sides = _sides(processor) or _pair(getattr(kind.config, "image_size", None)) or (224, 224)
    found = {"architecture": type(model).__name__, "input_size": (channels, *sides), **_normalisation(processor)}
    return found | ({"classifier": tuple(_heads(model))} if kind.classifies else {})


def _processor(place: str) -> dict[str, Any]:
    from transformers import BaseImageProcessor

    try:
        return dict(BaseImageProcessor.get_image_processor_dict(place)[0])
    except OSError:  # a model without one
        return {}


def _sides(processor: Mapping[str, Any]) -> tuple[int, int] | None:
    crops = processor.get("do_center_crop", "crop_size" in processor)
    return _pair(processor.get("crop_size") if crops else None) or _pair(processor.get("size"))


def _pair(size: Any) -> tuple[int, int] | None:
    """Return (height, width) of a size in a config: a number, a list, or a mapping."""
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    sides = [size, size] if isinstance(size, int) else size
    if isinstance(sides, list | tuple) and len(sides) == 2 and all(isinstance(side, int) for side in sides):
        return sides[0], sides[1]
    return None


def _normalisation(processor: Mapping[str, Any]) -> dict[str, Any]:
    """Return mean and std for images in [0, 1].

    A processor multiplies bytes by a factor, may subtract 1, and then normalises.
    """
    if not processor:
        return {}
    scale = 255 * (processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0)
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    normalises = processor.get("do_normalize", "image_mean" in processor)
    means, stds = (processor.get(key) for key in ("image_mean", "image_std"))
    if not normalises:
        means, stds = [0.0], [1.0]
    if not (means and stds):
        return {}
    return {
        "mean": tuple((mean + offset) / scale for mean in means),
        "std": tuple(std / scale for std in stds),
    }

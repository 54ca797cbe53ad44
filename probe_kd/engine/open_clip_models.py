"""Image towers of open_clip, from a config and weights in safetensors, without the models of text beside them."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from probe_kd.errors import TraceError, nearest
from probe_kd.files.atomic import read_text, reason

_ARCHITECTURE, _WEIGHTS = "open_clip_config.json", ("open_clip_model.safetensors", "model.safetensors")


class _Tower(NamedTuple):
    """An image tower of open_clip: its arguments, its preprocessing, and the place of its weights."""

    embed_dim: int
    vision: dict[str, Any]
    quick_gelu: bool
    preprocessing: Mapping[str, Any]
    weights: Any  # a folder, the name on the hub, or open_clip's own config of a tag; None without


def _tower(place: str) -> _Tower:
    if Path(place).is_dir():
        return _configured(_json(Path(place) / _ARCHITECTURE), Path(place))
    if "/" in place:
        from huggingface_hub import hf_hub_download

        return _configured(_json(Path(hf_hub_download(place, _ARCHITECTURE))), place)
    return _built_in(place)


def _built_in(place: str) -> _Tower:
    import open_clip

    name, _, tag = place.partition(".")
    config = open_clip.get_model_config(name)
    if config is None:
        raise TraceError(f"open_clip has no model {name!r}{nearest(name, open_clip.list_models())}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag and tag not in tags:
        raise TraceError(
            f"open_clip has no weights {tag!r} for {name}{nearest(tag, tags)}; it has {', '.join(tags) or 'none'}"
        )
    known = [open_clip.get_pretrained_cfg(name, it) for it in ([tag] if tag else tags)]
    gelu = bool(known[0].get("quick_gelu")) if tag else bool(config.get("quick_gelu"))
    numbers = [{key: it[key] for key in ("mean", "std") if key in it} for it in known]
    same = numbers[0] if numbers and all(it == numbers[0] for it in numbers) else {}
    return _Tower(config["embed_dim"], config["vision_cfg"], gelu, same, known[0] if tag else None)


def _configured(config: Any, weights: Any) -> _Tower:
    model = config.get("model_cfg") if isinstance(config, dict) else None
    if not isinstance(model, dict) or not isinstance(model.get("vision_cfg"), dict) or "embed_dim" not in model:
        raise TraceError(f"{_ARCHITECTURE} of {weights} has no `model_cfg` with `embed_dim` and `vision_cfg`")
    shown = config.get("preprocess_cfg") or {}
    return _Tower(model["embed_dim"], dict(model["vision_cfg"]), bool(model.get("quick_gelu")), shown, weights)


def _json(path: Path) -> Any:
    try:
        return json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as refusal:
        raise TraceError(f"cannot read {path}: {reason(refusal)}") from None


def arguments_of_open_clip(place: str) -> set[str]:
    from open_clip import CLIPVisionCfg

    _tower(place)
    elsewhere = {"image_size", "timm_model_name", "timm_model_pretrained"}
    return {field.name for field in fields(CLIPVisionCfg)} - elsewhere


def build_open_clip(place: str, arguments: dict[str, Any], pretrained: bool) -> nn.Module:
    from open_clip import CLIP, CLIPTextCfg
    from timm.layers import to_2tuple

    tower = _tower(place)
    vision = {**tower.vision, "timm_model_pretrained": False, **arguments}
    if ":" in str(vision.get("timm_model_name")):
        raise TraceError(f"the config of {place} takes its image tower from {vision['timm_model_name']!r}")
    words = CLIPTextCfg(context_length=1, vocab_size=1, width=8, heads=1, layers=1)  # no text is read
    model: nn.Module = CLIP(tower.embed_dim, vision, words, quick_gelu=tower.quick_gelu).visual
    height, width = to_2tuple(getattr(model, "image_size", 224))
    shown = {key: tuple(tower.preprocessing[key]) for key in ("mean", "std") if key in tower.preprocessing}
    model.pretrained_cfg = {  # type: ignore[assignment]
        "architecture": type(model).__name__,
        "input_size": (3, int(height), int(width)),
        "weights_prefix": "visual.",
        **(shown or _default_normalisation()),
    }
    if pretrained:
        _load_tower(model, place, tower)
    return model


def _default_normalisation() -> dict[str, Any]:
    """Return the mean and std that open_clip uses if a config has none."""
    from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return {"mean": tuple(OPENAI_DATASET_MEAN), "std": tuple(OPENAI_DATASET_STD)}


def _load_tower(model: nn.Module, place: str, tower: _Tower) -> None:
    from safetensors.torch import load_file

    path = _weights_of(place, tower)
    found = load_file(str(path))
    own = {key.removeprefix("visual."): value for key, value in found.items() if key.startswith("visual.")}
    if not own:
        raise TraceError(f"{path.name} of {place} holds no image tower: none of its weights are called `visual. ...`")
    model.load_state_dict(own)


def _weights_of(place: str, tower: _Tower) -> Path:
    """Return the safetensors file of the weights. Raises TraceError if there is none."""
    import open_clip
    from huggingface_hub import hf_hub_download

    if tower.weights is None:
        tags = open_clip.list_pretrained_tags_by_model(place)
        near = f"; name some of {', '.join(tags)}, as in `open_clip:{place}.{tags[0]}`" if tags else ""
        raise TraceError(f"open_clip:{place} has no weights{near}")
    if isinstance(tower.weights, Path):
        paths = [tower.weights / name for name in _WEIGHTS if (tower.weights / name).is_file()]
        path = paths[0] if paths else tower.weights
    elif isinstance(tower.weights, str):
        path = Path(hf_hub_download(place, _WEIGHTS[0]))
    else:
        path = Path(open_clip.download_pretrained(tower.weights))
    if path.suffix != ".safetensors":
        raise TraceError(f"the weights of open_clip:{place} are no safetensors; give {_WEIGHTS[0]}")
    return path

"""Small models of transformers and open_clip with random weights, in folders as their libraries write them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is in the extra `foreign`")
open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is in the extra `foreign`")

SMALL: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
}
VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
WORDS = {"context_length": 4, "vocab_size": 30, "width": 16, "heads": 2, "layers": 1}
NUMBERS = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
CLIP = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": WORDS}


def save_transformers(folder: Path, model: nn.Module, **processor: Any) -> str:
    """As `save_pretrained` writes it. Returns the name that probe-kd knows it by."""
    model.save_pretrained(folder)  # type: ignore[operator]
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return f"transformers:{folder}"


def save_open_clip(folder: Path) -> tuple[str, nn.Module]:
    """A whole CLIP of images and text, as `open_clip.push_to_hf_hub` writes it."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.CLIP(**CLIP).eval()
    folder.mkdir()
    config = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return f"open_clip:{folder}", model


def dino(folder: Path) -> str:
    torch.manual_seed(0)
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SMALL, num_register_tokens=4))
    return save_transformers(folder, model, **NUMBERS)


def siglip(folder: Path) -> str:
    """A model of images and text, of which only the vision model is used."""
    torch.manual_seed(0)
    text = {**SMALL, "vocab_size": 30, "max_position_embeddings": 4}
    words = {key: value for key, value in text.items() if key not in ("image_size", "patch_size")}
    config = transformers.SiglipConfig(vision_config=SMALL, text_config=words)
    return save_transformers(folder, transformers.SiglipModel(config), **NUMBERS)


def clip(folder: Path) -> str:
    return save_open_clip(folder)[0]

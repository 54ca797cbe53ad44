"""How a run computes on its device: precision, settings of torch, and memory format."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from accelerate import Accelerator

from probe_kd.engine.models import breaks_channels_last, build_on_meta, built_by_timm
from probe_kd.recipe.keys import Recipe


def mixed_precision(recipe: Recipe, device_type: str) -> str | None:
    """The precision to request from accelerate: the recipe's, or bf16 on a GPU that computes in it.

    None leaves the choice to accelerate. Its own setting (`accelerate launch --mixed_precision`) takes precedence.
    """
    if recipe.precision or device_type != "cuda" or os.environ.get("ACCELERATE_MIXED_PRECISION"):
        return recipe.precision
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else None


def _in_half(recipe: Recipe, device_type: str) -> bool:
    precision = mixed_precision(recipe, device_type) or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return precision in ("bf16", "fp16")


@contextmanager
def cuda_settings(recipe: Recipe) -> Iterator[None]:
    """Configure cuDNN and cuBLAS for a run, and restore the settings of the process at the end.

    `cudnn.benchmark` times convolutions once for every shape. Under autocast, products that stay in float32 are
    computed in TensorFloat32. These are the matrices of the losses, which are exact for features in bf16.
    """
    if not torch.cuda.is_available():
        yield
        return
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision(recipe.matmul_precision or ("high" if _in_half(recipe, "cuda") else before[1]))
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def describe_device(recipe: Recipe, accelerator: Accelerator) -> str:
    """Describe the settings of a run on a GPU in one line; empty on a CPU."""
    if accelerator.device.type != "cuda":
        return ""
    layout = "channels last" if memory_format(recipe, accelerator.device) is torch.channels_last else "channels first"
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    products = torch.get_float32_matmul_precision()
    return (
        f"{torch.cuda.get_device_name(accelerator.device)}: {precision}, {layout}, float32 matrix products in "
        f"{products!r} precision, cuDNN benchmark on; `precision`, `channels_last` and `matmul_precision` change it"
    )


def memory_format(recipe: Recipe, device: torch.device) -> torch.memory_format:
    """The memory format of models and images: the recipe's choice, or channels last where convolutions are faster.

    They were measured to be faster on the CPU (benchmarks/modes.py) and on a GPU in half precision (benchmarks/gpu.py).
    Models that are not timm's keep their format: `x.view(len(x), -1)` after a convolution fails with channels last. So
    do, on a CPU, models with a layer whose backward would corrupt the heap.
    """
    channels_last = recipe.channels_last
    if channels_last is None:
        models = [options.model for options in (recipe.student, *recipe.teachers_by_name.values())]
        faster = device.type == "cpu" or (device.type == "cuda" and _in_half(recipe, "cuda"))
        channels_last = faster and all(map(built_by_timm, models))
        channels_last = channels_last and not (device.type == "cpu" and unsafe_layer(recipe))
    return torch.channels_last if channels_last else torch.contiguous_format


def unsafe_layer(recipe: Recipe) -> str:
    """The first layer, as `student.NAME`, that must not use channels last on a CPU; empty if there is none."""
    for side in ("student", "teacher"):
        options = getattr(recipe, side)
        if options is not None and built_by_timm(options.model):
            name = _unsafe_layer_of(options.model, json.dumps(options.model_kwargs, sort_keys=True, default=list))
            if name:
                return f"{side}.{name}"
    return ""


@cache
def _unsafe_layer_of(model: str, model_kwargs: str) -> str:
    return breaks_channels_last(build_on_meta(model, json.loads(model_kwargs)))
